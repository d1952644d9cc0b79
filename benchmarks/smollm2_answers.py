"""A fixed list of questions, answered before and after training: all of them, and not the best three.

Run as: python benchmarks/smollm2_answers.py    (after smollm2_learning_rates.py; minutes)

Writes benchmarks/results/smollm2_answers.json. Greedy, on the NF4 base as trained. Every tenth held-out question
has its reference answer beside it; the other questions are of everyday knowledge, which training never touched.
"""

import torch
from peft import PeftModel
from smollm2_learning_rates import run_folder
from smollm2_losses import begin, questions_and_answers, write

from nbutils.models.loading import load_nf4

RATE = "3.0e-3"
NEW_TOKENS = 80
EVERYDAY = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "How many legs do two spiders have together?",
    "Write one sentence about the sea.",
)


def questions() -> list[dict]:
    """Every tenth held-out question with its reference answer, and then the everyday ones."""
    held_out = [
        {"prompt": before, "reference": answer["content"]} for before, answer in questions_and_answers()[::10]
    ]
    return held_out + [
        {"prompt": [{"role": "user", "content": text}], "reference": None} for text in EVERYDAY
    ]


@torch.no_grad()
def answer(model, tokenizer, prompt: list[dict]) -> dict:
    """The greedy answer, and whether the model ended it by itself."""
    inputs = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True)
    new = output[0, inputs["input_ids"].shape[1] :]
    ended = tokenizer.eos_token_id in new.tolist()
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True).strip(),
        "tokens": len(new),
        "ended": ended,
    }


def main() -> None:
    base, tokenizer, _ = begin()
    model = PeftModel.from_pretrained(load_nf4(str(base)), str(run_folder(RATE) / "train" / "adapter")).eval()
    rows = []
    for question in questions():
        with model.disable_adapter():
            before = answer(model, tokenizer, question["prompt"])
        rows.append({**question, "before": before, "after": answer(model, tokenizer, question["prompt"])})
        print(rows[-1], flush=True)
    write(
        "smollm2_answers",
        "python benchmarks/smollm2_learning_rates.py; python benchmarks/smollm2_answers.py",
        "SmolLM2-135M-Instruct in NF4, greedy answers before and after 40 steps; it learned the manner, not the facts",
        learning_rate=float(RATE),
        new_tokens_at_most=NEW_TOKENS,
        questions=rows,
    )


if __name__ == "__main__":
    main()
