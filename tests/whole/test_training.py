"""The real script, launched on two processes: what it promises, and what happens when a promise is broken."""

import json
import subprocess
import sys
from pathlib import Path

import chats
import nbformat
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, LlamaForCausalLM, TrainerState, TrainingArguments

from nbutils.common.paths import ROOT
from nbutils.launching.launch import LaunchFailed, choose_config, launch
from nbutils.launching.script_file import script_text
from nbutils.models.tiny import tiny_base, tiny_config
from nbutils.models.tiny_plain import tiny_plain

pytestmark = pytest.mark.launch

SETTINGS = {
    "dataset": "data/instructions/train.jsonl",
    "heldout_dataset": "data/instructions/heldout.jsonl",
    "max_steps": 6,
    "max_length": 128,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 8,
    "learning_rate": 5.0e-3,
    "lora_r": 8,
    "logging_steps": 1,
    "eval_steps": 3,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def edited(*changes: tuple[str, str]) -> str:
    """The script with some words replaced; each must be there."""
    text = script_text()
    for old, new in changes:
        assert old in text, f"the script no longer says {old!r}"
        text = text.replace(old, new)
    return text


def train(folder, fsdp_version=1, script=None, rehearsal=True, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "script.py"
    path.write_text(script or script_text())
    output = folder / "out"
    everything = {"model": str(tiny_base()), "output_dir": str(output), **SETTINGS, **settings}
    (folder / "train.yaml").write_text(yaml.safe_dump(everything))
    launch(
        path,
        ["--config", str(folder / "train.yaml")],
        choose_config(fsdp_version, rehearsal=True),
        rehearsal=rehearsal,
        log=folder / "train.log",
        output_dir=output,
        timeout=240,
        show=False,
    )
    return output


def losses(output, name="loss", where=None):
    """One figure of each line of the progress file that has it, or that has the figure `where`."""
    lines = [json.loads(line) for line in (output / "progress.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if (where or name) in line]


def assert_whole(adapter, layers=4):
    """7 linear layers a decoder layer, an A and a B each, and no B that is all zero."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 7 * layers * 2
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return train(tmp_path_factory.mktemp("fsdp1"))


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    return train(tmp_path_factory.mktemp("fsdp2"), fsdp_version=2, report_to="tensorboard")


@pytest.mark.parametrize(("run", "version"), [("first", 1), ("second", 2)])
def test_it_is_fsdp_over_sharded_nf4(run, version, request):
    facts = json.loads((request.getfixturevalue(run) / "run.json").read_text())["training"]
    assert (facts["distributed_type"], facts["fsdp_version"], facts["world_size"]) == ("FSDP", version, 2)
    assert (facts["quant_type"], facts["quant_storage"]) == ("nf4", "bfloat16")
    half = facts["nf4_bytes_total"] / 2
    assert half > 0
    assert all(abs(held - half) <= 0.05 * half for held in facts["nf4_bytes_per_rank"])
    assert (facts["frozen_dtypes"], facts["mixed_precision"]) == (["bfloat16"], "no")
    assert facts["activation_checkpointing"]
    assert facts["use_reentrant"] is False


@pytest.mark.parametrize("run", ["first", "second"])
def test_it_learns_and_saves_a_whole_adapter(run, request):
    output = request.getfixturevalue(run)
    facts = json.loads((output / "run.json").read_text())
    assert facts["training"]["held_out_loss_after"] < facts["training"]["held_out_loss_before"]
    assert facts["adapter"]["verified"]
    assert_whole(output / "adapter")


@pytest.mark.parametrize("run", ["first", "second"])
def test_the_model_at_the_end_is_evaluated_once(run, request):
    output = request.getfixturevalue(run)
    steps = losses(output, "step", where="eval_loss")
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == SETTINGS["max_steps"]
    after = json.loads((output / "run.json").read_text())["training"]["held_out_loss_after"]
    assert after == losses(output, "eval_loss")[-1]


def test_tensorboard_has_the_losses_where_it_was_asked_for_and_nowhere_else(first, second):
    (folder,) = {file.parent for file in (second / "runs").rglob("events.out.tfevents.*")}
    board = EventAccumulator(str(folder)).Reload()
    for curve, name in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        drawn = [(scalar.step, scalar.value) for scalar in board.Scalars(curve)]
        assert [step for step, _ in drawn] == losses(second, "step", where=name)
        assert [value for _, value in drawn] == pytest.approx(losses(second, name), rel=1e-6)  # drawn in fp32
    assert not list(first.rglob("events.out.tfevents.*"))


def test_both_versions_give_the_same_losses(first, second):
    assert losses(first) == pytest.approx(losses(second), rel=0.01)
    assert losses(first, "eval_loss") == pytest.approx(losses(second, "eval_loss"), rel=0.01)


def test_evaluating_changes_no_training_loss(first, tmp_path):
    """Evaluations before and in the middle of training: on some CPUs the first one spoils the 4-bit weights."""
    never = train(
        tmp_path,
        script=edited(
            ("    eval_on_start: bool = True", "    eval_on_start: bool = False"),
            ('    eval_strategy: str = "steps"', '    eval_strategy: str = "no"'),
        ),
        eval_steps=1000,
    )
    assert len(losses(first, "eval_loss")) >= 3
    assert losses(never) == losses(first)


@pytest.mark.parametrize("version", [1, 2])
def test_a_base_model_with_tied_embeddings_and_a_users_own_alpaca_file(tmp_path, version):
    """No chat template, no padding token, the tokenizer puts the begin token, a tied head, a thousand Alpaca rows."""
    config = tiny_config()
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_plain()).save_pretrained(tmp_path / "base")
    rows = [{"instruction": f"Add {i} and 1.", "input": "", "output": str(i + 1)} for i in range(1000)]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    output = train(
        tmp_path / "run",
        version,
        model=str(tmp_path / "base"),
        dataset=str(tmp_path / "alpaca.json"),
        heldout_dataset=None,
        max_steps=3,
    )
    assert_whole(output / "adapter")
    saved = AutoTokenizer.from_pretrained(output / "adapter")
    assert "Question: " in saved.chat_template
    assert saved.pad_token == "<|finetune_right_pad_id|>"


def test_chats_of_several_answers_train_packed(tmp_path):
    """A ShareGPT file of short chats: read, split by whole chats, marked, packed, trained, and its adapter verified."""
    (tmp_path / "chats.json").write_text(json.dumps(chats.share_gpt(200)))
    output = train(
        tmp_path / "run",
        2,
        dataset=str(tmp_path / "chats.json"),
        heldout_dataset=None,
        packing=True,
        max_length=512,
        max_steps=3,
    )
    assert_whole(output / "adapter")
    said = (tmp_path / "run/train.log").read_text()
    assert "190 rows, " in said and "10 held-out rows, " in said and "Not used of the rows: id." in said
    training = json.loads((output / "run.json").read_text())["training"]
    assert training["held_out_loss_after"] < training["held_out_loss_before"]


# max_steps of the notebook, what it means, steps of the warm-up, steps between two evaluations
@pytest.mark.parametrize("asked, steps, warmup, between", [(90, 90, 9, 30), (1, 1, 0, 1), (-1, 69, 7, 23)])
def test_the_notebook_derives_warmup_and_evaluation_from_the_steps(asked, steps, warmup, between, tmp_path):
    cells = nbformat.read(ROOT / "notebooks/04_write_and_launch.ipynb", as_version=4).cells
    (parameters,) = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    halves = [cell.source for cell in cells if cell.source.startswith(("import yaml", "settings |="))]
    given = {"Path": Path, "base_model": "", "train_dir": tmp_path}
    exec(parameters, given)
    exec("\n".join(halves), given | {"run_dir": tmp_path, "max_steps": asked})
    told = yaml.safe_load((tmp_path / "train.yaml").read_text())
    assert told["max_steps"] == asked
    training = TrainingArguments(
        str(tmp_path), use_cpu=True, warmup_steps=told["warmup_steps"], eval_steps=told["eval_steps"]
    )
    state = TrainerState(max_steps=steps)
    state.compute_steps(training, steps)
    assert (training.get_warmup_steps(steps), state.eval_steps) == (warmup, between)


def test_with_the_cast_put_back_the_preflight_refuses(tmp_path):
    script = edited(
        ("prepare_for_fsdp_qlora(\n        model,", "prepare_model_for_kbit_training(\n        model,"),
        ("activation_checkpointing=training.activation_checkpointing,\n", ""),
        (
            'use_reentrant=training.activation_checkpointing_kwargs["use_reentrant"],',
            "use_gradient_checkpointing=False,",
        ),
        ("from peft import LoraConfig, ", "from peft import LoraConfig, prepare_model_for_kbit_training, "),
    )
    with pytest.raises(LaunchFailed, match=r"float32"):
        train(tmp_path, script=script)
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_launch_that_falls_back_from_fsdp_fails(tmp_path, monkeypatch):
    """The same file and script without the rehearsal: Accelerate runs DDP on a CPU, and says nothing."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(LaunchFailed, match=r"FSDP was asked for, but the run is MULTI_CPU"):
        train(tmp_path, rehearsal=False)
    assert not (tmp_path / "out" / "adapter").exists()


def test_saving_with_the_plain_trainer_call_is_noticed(tmp_path):
    """Under FSDP 1 and peft 0.21 `save_model` writes a file without tensors; peft 0.20 writes them."""
    script = edited(
        (
            'proof = save_adapter(trainer.model, output / "adapter", tokenizer)',
            'proof = trainer.save_model(str(output / "adapter")) or {}',
        ),
    )
    script = script.replace("{proof['tensors']} tensors saved and verified", "saved")
    output = train(tmp_path, script=script, max_steps=2)
    import peft

    if peft.__version__.startswith("0.20"):
        assert_whole(output / "adapter")
    else:
        with pytest.raises((AssertionError, FileNotFoundError)):
            assert_whole(output / "adapter")


def test_an_evaluation_that_fails_at_the_end_loses_no_adapter(tmp_path):
    """Held-out rows without an answer are refused at the start; here they are lost after it."""
    with pytest.raises(LaunchFailed, match="The evaluation of 0 held-out rows gave no loss; wanted"):
        train(
            tmp_path,
            script=edited(("eval_dataset=heldout,", "eval_dataset=heldout.select(range(0)),")),
            max_steps=2,
        )
    assert_whole(tmp_path / "out/adapter")


def test_a_rehearsal_leaves_its_process_group_before_it_ends(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit\nimport torch.distributed as dist\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "print('joined', dist.is_initialized())\n"
        "atexit.register(lambda: print('at the end', dist.is_initialized()))\n"
    )
    words = [sys.executable, "-m", "nbutils.launching.rehearsal", str(script)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "joined True\nat the end False\n"
