"""Save as the recipe of 2024 does, and as we do, after two steps of the Trainer under FSDP.

Run as: accelerate launch --config_file CONFIG -m nbutils.launching.rehearsal THIS FOLDER
"""

import json
import sys
from pathlib import Path

import peft
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from nbutils.adapters import save as saving


def main(folder: Path) -> None:
    arguments = TrainingArguments(output_dir=str(folder / "out"), max_steps=2, per_device_train_batch_size=2,
                                  learning_rate=1e-2, bf16=False, report_to=[], save_strategy="no",
                                  disable_tqdm=True)  # fmt: skip
    set_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    rows = [{"input_ids": (row := torch.randint(96, (16,))), "labels": row} for _ in range(16)]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    seen = {"peft": peft.__version__, "type": str(trainer.accelerator.distributed_type)}
    seen["ours"] = saving.save_adapter(trainer.model_wrapped, folder / "ours")
    trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder / "plain"))
    trainer.accelerator.wait_for_everyone()
    try:
        seen["plain"] = saving.verify_adapter(trainer.model_wrapped, folder / "plain")
    except saving.AdapterMismatch as error:
        seen["refused"] = str(error)
    if trainer.is_world_process_zero():
        file = folder / "plain" / saving.WEIGHTS
        seen |= {"plain bytes": file.stat().st_size, "plain tensors": len(load_file(file))}
        (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
