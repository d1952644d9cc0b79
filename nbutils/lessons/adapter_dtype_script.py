"""Which dtype does the adapter train in? Four settings, one after the other, on real ranks. Lesson 03 starts it.

Run as: accelerate launch ... nbutils/lessons/adapter_dtype_script.py MODEL OUTPUT
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from nbutils.data.rows import load_conversations
from nbutils.data.training_rows import rows_to_learn
from nbutils.models.loading import load_nf4, load_tokenizer
from nbutils.patches.fsdp2_gather import gather_as_bytes
from nbutils.training.prep import prepare_for_fsdp_qlora


def dtypes(parameters) -> str:
    """The dtypes of those that train, as `bfloat16`, or `bfloat16/float32`."""
    return "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters if p.requires_grad}))


def keep_adapter_in_fp32(model: PeftModel) -> None:
    """To be called after `SFTTrainer(...)`, which has cast the adapter to bf16, and before `train()`."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def trainer_of(model: PeftModel, model_path: str, output: Path, bf16: bool) -> SFTTrainer:
    """TRL's trainer for three steps."""
    settings = SFTConfig(
        output_dir=str(output),
        max_steps=3,
        per_device_train_batch_size=2,
        max_length=128,
        learning_rate=6e-3,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = load_tokenizer(model_path)
    conversations = load_conversations("data/instructions/train.jsonl")[:32]
    rows = rows_to_learn(conversations, tokenizer, settings.max_length)
    return SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)


def one_setting(model_path: str, output: Path, bf16: bool, back_to_fp32: bool) -> dict:
    """The adapter's dtype at each station of its way, and how the steps went."""
    AcceleratorState._reset_state()  # several trainers in one process; a training script needs no such line
    set_seed(0)
    model = prepare_for_fsdp_qlora(load_nf4(model_path), activation_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    seen = {"bf16": bf16, "cast back": back_to_fp32, "from PEFT": dtypes(model.parameters())}
    trainer = trainer_of(model, model_path, output, bf16)
    seen["from TRL"] = dtypes(model.parameters())
    if back_to_fp32:
        keep_adapter_in_fp32(model)
    try:
        trainer.train()
    except RuntimeError as error:
        return seen | {"trained in": f"{type(error).__name__}: {error}".splitlines()[0]}
    states = [v for state in trainer.optimizer.state.values() for k, v in state.items() if k != "step"]
    return seen | {
        "trained in": dtypes(trainer.model_wrapped.parameters()),
        "Adam's averages": "/".join(sorted({str(v.dtype).removeprefix("torch.") for v in states})),
        "last loss": f"{[row['loss'] for row in trainer.state.log_history if 'loss' in row][-1]:.5f}",
    }


@record
def main() -> None:
    """Run the four settings, and write what was seen to adapter_dtype.json in the output folder."""
    warnings.simplefilter("ignore")
    model_path, output = sys.argv[1], Path(sys.argv[2])
    state = PartialState()
    gather_as_bytes()  # FSDP 2 on GPUs, as in notebook 02b
    settings = [(bf16, back) for bf16 in (False, True) for back in (False, True)]
    results = [one_setting(model_path, output, *setting) for setting in settings]
    if state.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        (output / "adapter_dtype.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
