"""QLoRA as on one GPU: the standard prep, then TRL. Lesson 02 starts it on several ranks.

Run as: accelerate launch ... nbutils/lessons/one_gpu_script.py MODEL OUTPUT
"""

import sys
import warnings

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from nbutils.data.rows import load_conversations
from nbutils.data.training_rows import rows_to_learn
from nbutils.models.loading import load_nf4, load_tokenizer
from nbutils.training.progress_log import ProgressLog


def prepared_as_on_one_gpu(model_path: str) -> PeftModel:
    """Load in 4 bits, the standard prep, an adapter: the lines that tutorials for one GPU have."""
    model = load_nf4(model_path)
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    set_seed(0)
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))


def trainer_of(model: PeftModel, model_path: str, output: str) -> SFTTrainer:
    """TRL's trainer for four steps."""
    settings = SFTConfig(
        output_dir=output,
        max_steps=4,
        per_device_train_batch_size=4,
        max_length=128,
        learning_rate=6e-3,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = load_tokenizer(model_path)
    conversations = load_conversations("data/instructions/train.jsonl")[:64]
    rows = rows_to_learn(conversations, tokenizer, settings.max_length)
    return SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)


@record
def main() -> None:
    """Train, and print what this rank holds."""
    model_path, output = sys.argv[1:]
    warnings.simplefilter("ignore")
    PartialState()
    trainer = trainer_of(prepared_as_on_one_gpu(model_path), model_path, output)
    trainer.add_callback(ProgressLog(output))
    trainer.train()
    parameters = list(trainer.model.parameters())
    held = sum(p.to_local().numel() * p.element_size() for p in parameters)
    fp32 = sum(p.numel() for p in parameters if p.dtype == torch.float32)
    print(f"rank {trainer.args.process_index} holds {held:,} bytes; {fp32:,} numbers of the model are fp32")


if __name__ == "__main__":
    main()
