"""Bad input, cause by cause: refused before a weight is read, in a sentence, with nothing lost.

Two tables. What is wrong with the config file is refused by `python -m nbutils launch` before a rank starts; what is
wrong with settings, model, data or machine by the real script, on two ranks, before it loads. The ranks of the second
table are forked from one process that has imported the libraries; `make matrix` sends all of it through the launcher,
one real launch a row, and records the seconds.
"""

import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from processes import ranks_of
from recording import record
from safetensors.torch import load_file, save_file
from transformers import GPT2Config
from trl import SFTConfig

from nbutils.common.paths import ROOT
from nbutils.common.refused import Refused
from nbutils.data.templates import PAD_CANDIDATES
from nbutils.launching.config_faults import BadConfig, refuse_bad_config
from nbutils.launching.config_files import RECIPE, RECIPE_FSDP2, variant
from nbutils.launching.launch import choose_config
from nbutils.launching.script_file import write_script
from nbutils.models.loading import quantise_checkpoint
from nbutils.models.tiny import tiny_base
from nbutils.planning.hybrid_shard import SPELLINGS
from nbutils.training import before_loading as refusing
from nbutils.training.shared_output import Token

pytestmark = pytest.mark.launch

HYBRID = Path("configs/machines/two_machines_hybrid.yaml")
COMMAND = "python -m pytest -m matrix -s tests/whole/test_bad_input.py"
SETTINGS = {
    "dataset": str(ROOT / "data/instructions/train.jsonl"),
    "heldout_dataset": str(ROOT / "data/instructions/heldout.jsonl"),
    "max_steps": 2,
    "max_length": 256,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "lora_r": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "no",
    "disable_tqdm": True,
}
GOOD = '{"prompt": "What is a shard?", "completion": "A slice."}\n'


# ---- the table of the launcher: a config file that would not start what was meant -----------------------------------

CONFIGS = {
    "more processes than GPUs": (
        RECIPE,
        {},
        r"asks for 2 processes on this machine, one a GPU, and it shows 0 GPUs",
    ),
    "more processes than one GPU": (
        RECIPE,
        {},
        r"one a GPU, and it shows 1 GPU\. Set num_processes to 1, .*: CUDA_VISIBLE_DEVICES= make tutorial$",
    ),
    "hybrid, one rank a machine": (
        HYBRID,
        {"num_processes": 2},
        r"HYBRID_SHARD with 1 rank a machine, wanted at least 2: .* Take FULL_SHARD",
    ),
    "hybrid by number, one rank a machine": (
        HYBRID,
        {"num_processes": 2, "fsdp_sharding_strategy": 5},
        r"fsdp_sharding_strategy is 5 with 1 rank a machine",
    ),
    "hybrid on two of four GPUs": (
        HYBRID,
        {},
        r"HYBRID_SHARD with 2 ranks a machine, each of which sees 4 devices; .* show 2 with CUDA_VISIBLE_DEVICES",
    ),
    "misspelt key": (
        RECIPE,
        {"num_proceses": 2},
        r"knows no key num_proceses, .* Did you mean num_processes\?",
    ),
    "misspelt FSDP key": (
        RECIPE,
        {"fsdp_sharding_stratgy": "FULL_SHARD"},
        r"knows no key fsdp_sharding_stratgy below fsdp_config, .* Did you mean",
    ),
    "FSDP 1 key in an FSDP 2 file": (
        RECIPE_FSDP2,
        {"fsdp_use_orig_params": False},
        r"fsdp_use_orig_params belongs to FSDP 1",
    ),
    "FSDP 2 key in an FSDP 1 file": (
        RECIPE,
        {"fsdp_reshard_after_forward": True},
        r"fsdp_reshard_after_forward belongs to FSDP 2",
    ),
    "misspelt value": (
        RECIPE,
        {"fsdp_sharding_strategy": "FULLSHARD"},
        r"cannot make an FSDP plugin .*'FULLSHARD'",
    ),
    "no such FSDP": (RECIPE, {"fsdp_version": 3}, r"fsdp_version is 3; there is 1 and 2"),
    "mixed precision": (RECIPE, {"mixed_precision": "fp16"}, r"mixed_precision is fp16, wanted 'no'"),
    "machines of unequal size": (
        RECIPE,
        {"num_machines": 2, "num_processes": 3},
        r"3 processes cannot be shared out evenly",
    ),
    "machines without an address": (RECIPE, {"num_machines": 2}, r"2 machines, and no main_process_ip"),
    "no processes": (RECIPE, {"num_processes": 0}, r"num_processes is 0, .*wanted whole numbers from 1"),
}

GPUS = {
    "more processes than GPUs": 0,
    "more processes than one GPU": 1,
    "hybrid on two of four GPUs": 4,
}  # a rehearsal does not ask


@pytest.mark.parametrize("cause", CONFIGS)
def test_a_bad_config_is_refused(cause, tmp_path):
    file, changes, words = CONFIGS[cause]
    with pytest.raises(BadConfig, match=words) as refused:
        refuse_bad_config(variant(ROOT / file, tmp_path, **changes), gpus=GPUS.get(cause))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("asked", [0, -1])
def test_a_number_of_processes_that_cannot_be_is_refused_whatever_the_file_says(asked):
    with pytest.raises(BadConfig, match=f"num_processes is {asked}, .*wanted whole numbers from 1"):
        refuse_bad_config(ROOT / RECIPE, num_processes=asked)


def test_a_file_that_is_no_config(tmp_path):
    for text, words in {
        "a: [": "cannot be read as YAML",
        "- a": "must hold lines `key: value`",
        "distributed_type: FSDP": "distributed_type: FSDP and has no fsdp_config",
    }.items():
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(BadConfig, match=words):
            refuse_bad_config(tmp_path / "c.yaml")
    with pytest.raises(BadConfig, match=r"Did you mean .*config_fsdp\.yaml\?"):
        refuse_bad_config(ROOT / "configs/accelerate/config_fdsp.yaml")


OURS = [*ROOT.glob("configs/accelerate/*.yaml"), *ROOT.glob("configs/machines/*.yaml")]


@pytest.mark.parametrize("file", sorted(OURS), ids=lambda file: file.name)
def test_every_config_of_ours_is_accepted(file):
    refuse_bad_config(file)


# ---- the table of the script ----------------------------------------------------------------------------------------


class Case:
    """A row being prepared: a folder of its own, a model that is a copy of the tiny base, settings to spoil."""

    def __init__(self, folder: Path):
        self.folder, self.settings, self.path, self.variables = folder, {}, None, {}
        (folder / "out/adapter").mkdir(parents=True)
        (folder / "out/adapter/adapter_config.json").write_text("{}")  # an earlier adapter, which must stay
        (folder / "out/notes.txt").write_text("keep me")

    def rows(self, text: str, name: str = "rows.jsonl") -> None:
        (self.folder / name).write_text(text, encoding="utf-8")
        self.settings["dataset"] = str(self.folder / name)

    def base(self, **changes) -> Path:
        """A copy of the tiny base, some keys of its config changed; the weights are linked."""
        base = self.folder / "base"
        shutil.copytree(tiny_base(), base, copy_function=os.link)
        config = json.loads((base / "config.json").read_text()) | changes
        (base / "config.json").unlink()
        (base / "config.json").write_text(json.dumps(config))
        self.settings["model"] = str(base)
        return base

    def installed(self, package: str, version: str) -> None:
        """What Python says when it is asked for a version: metadata that lies before the installed one."""
        info = self.folder / "site" / f"{package}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        self.path = str(info.parent)


def variables(**changes):
    return lambda case: case.variables.update(changes)


def settings(**changes):
    return lambda case: case.settings.update(changes)


def rows(text, name="rows.jsonl"):
    return lambda case: case.rows(text, name)


def gated(case):
    case.settings["model"] = "meta-llama/gated"


def no_llama(case):
    base = case.base()
    (base / "config.json").write_text(GPT2Config().to_json_string())


def cut_weights(case):
    file = case.base() / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[: len(content) // 2])


def without(name):
    return lambda case: (case.base() / name).unlink()


def damaged(name):
    def damage(case):
        file = case.base() / name
        file.unlink()
        file.write_text("{")

    return damage


def huge(case):
    """The shape of a Llama of 405 B parameters; of its checkpoint a header and a hole, more is not looked at."""
    base = case.base(
        hidden_size=16384,
        intermediate_size=53248,
        num_attention_heads=128,
        num_hidden_layers=126,
        head_dim=128,
    )
    header = {
        "lm_head.weight": {"dtype": "BF16", "shape": [1024, 16384], "data_offsets": [0, 1024 * 16384 * 2]}
    }
    text = json.dumps(header).encode()
    (base / "model.safetensors").unlink()
    with (base / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 1024 * 16384 * 2)


def too_few_embeddings(case):
    case.base(vocab_size=512)


def another_run(case):
    (case.folder / "out/checkpoint-50").mkdir()


def adapter_name_taken(case):
    (case.folder / "out/adapter/adapter_config.json").unlink()
    (case.folder / "out/adapter/thesis.txt").write_text("years of work")


def output_is_a_file(case):
    (case.folder / "file").write_text("a file")
    case.settings["output_dir"] = str(case.folder / "file")


def long_questions_held_out(case):
    row = {"prompt": "What is a shard? " * 300, "completion": "A slice."}
    (case.folder / "heldout.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    case.settings["heldout_dataset"] = str(case.folder / "heldout.jsonl")


def pipe(case):
    os.mkfifo(case.folder / "rows.jsonl")
    case.settings["dataset"] = str(case.folder / "rows.jsonl")


def no_padding_token(case):
    base = case.base()
    told = json.loads((base / "tokenizer_config.json").read_text())
    told["pad_token"] = told["eos_token"]
    words = (base / "tokenizer.json").read_text()
    for token in PAD_CANDIDATES:
        words = words.replace(token, token.upper())
    for name, text in {"tokenizer_config.json": json.dumps(told), "tokenizer.json": words}.items():
        (base / name).unlink()  # a link to the cached one
        (base / name).write_text(text)


CASES = {
    # settings
    "misspelt setting": (settings(max_stepss=5), r"max_stepss"),
    "setting of the wrong type": (
        settings(max_steps="many"),
        r"argument --max_steps.*: invalid int value: 'many'",
    ),
    "mixed precision against storage": (
        settings(fp16=True),
        r"Mixed precision is fp16 and .* stored as bfloat16; wanted 'no'",
    ),
    "rank of zero": (settings(lora_r=0), r"lora_r 0 .* must be above 0"),
    "learning rate below zero": (settings(learning_rate=-1.0), r"learning_rate -1\.0; both must be above 0"),
    "no word on reentrant checkpoints": (
        settings(activation_checkpointing_kwargs={}),
        r"use_reentrant: false",
    ),
    "a log that never comes": (settings(logging_steps=10), r"logging_steps is 10 and max_steps 2: no loss"),
    "no log at all": (
        settings(logging_strategy="no"),
        r"logging_strategy is no: no loss would ever be logged",
    ),
    "checkpoints of another kind": (
        settings(
            load_best_model_at_end=True,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
        ),
        r"Found load_best_model_at_end; these checkpoints",
    ),
    "hybrid, two machines of one rank": (
        variables(FSDP_SHARDING_STRATEGY="HYBRID_SHARD", LOCAL_WORLD_SIZE="1"),
        r"HYBRID_SHARD with 1 rank a machine, wanted at least 2: .* Take FULL_SHARD",
    ),
    "compiled under FSDP 1": (settings(compile_layers=True), r"compile_layers wants FSDP 2"),
    # model
    "gated model": (gated, r"meta-llama/gated is behind a licence\. Accept it on .* hf auth login"),
    "no such model on the hub": (
        settings(model="nobody/nothing"),
        r"nobody/nothing is neither a local folder nor a model",
    ),
    "no such folder": (settings(model="./no/such/folder"), r"There is no folder \./no/such/folder"),
    "folder without a model": (without("config.json"), r"holds no config\.json"),
    "damaged config": (damaged("config.json"), r"config\.json is no JSON object"),
    "unsupported architecture": (no_llama, r"is a gpt2; wanted a model of the architecture llama"),
    "quantised in another way": (
        lambda case: case.base(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"is quantised as gptq; wanted NF4",
    ),
    "4-bit, but not NF4": (
        lambda case: case.base(
            quantization_config={
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "fp4",
            }
        ),
        r"is quantised as fp4; wanted NF4",
    ),
    "weights cut short": (cut_weights, r"model\.safetensors in .* is cut short or damaged"),
    "weights missing": (without("model.safetensors"), r"holds neither model\.safetensors nor"),
    "damaged tokenizer": (damaged("tokenizer.json"), r"The tokenizer of .* cannot be read"),
    "tokenizer of another model": (too_few_embeddings, r"has 1,024 tokens and the model 512"),
    "tokenizer that cannot pad": (no_padding_token, r"no padding token of its own and none of"),
    # data
    "no such file": (settings(dataset="no/such/file.jsonl"), r"There is no file no/such/file\.jsonl"),
    "no such set on the hub": (
        settings(dataset="nobody/nothing"),
        r"nobody/nothing is no file here, and the hub gives no",
    ),
    "empty set": (rows(""), r"holds no rows"),
    "wrong columns": (
        rows('{"question": "a", "answer": "b"}\n'),
        r"has the columns answer, question, .*Wanted: messages",
    ),
    "row that is no text": (
        rows(GOOD * 3 + '{"prompt": "a", "completion": 5}\n'),
        r"row 4: completion must be text, found int",
    ),
    "empty row": (rows(GOOD * 2 + '{"prompt": "a", "completion": " "}\n'), r"row 3: completion is empty"),
    "row without an answer": (
        rows(GOOD + '{"prompt": "a"}\n'),
        r"row 2: completion must be text, found NoneType",
    ),
    "broken line": (rows(GOOD * 5 + '{"prompt": "a", "comp\n' + GOOD), r"line 6: this is no JSON"),
    "damaged Parquet": (rows("PAR1 nonsense", "rows.parquet"), r"rows\.parquet cannot be read as parquet"),
    "a pipe in place of a file": (pipe, r"is a pipe or a device"),
    "rows longer than the context": (
        settings(max_length=4096),
        r"max_length is 4,096 tokens and the context of .* has 2,048",
    ),
    "no row keeps its answer": (
        settings(max_length=8),
        r"Every one of the \d+ rows is longer than max_length, 8 tokens",
    ),
    "no held-out row keeps its answer": (
        long_questions_held_out,
        r"Every one of the 2 held-out rows is longer than max_length, 256 tokens, .* no held-out loss",
    ),
    # machine
    "another run": (another_run, r"holds checkpoint-50 of an earlier run\. Go on from it with --resume true"),
    "adapter folder of something else": (
        adapter_name_taken,
        r"holds something that is no adapter \(thesis\.txt\)",
    ),
    "output is a file": (output_is_a_file, r"output_dir .* is a file; wanted a folder"),
    "no disk for the checkpoints": (
        settings(save_strategy="steps", save_steps=1, max_steps=10**10),
        r"the checkpoints and the adapter need [\d,.]+ GB and [\d,.]+ GB are free",
    ),
    "too little host memory": (
        huge,
        r"2 processes need about [\d.]+ GiB of host memory on this machine \(planned\), and [\d.]+ GiB are free",
    ),
    "broken version": (
        lambda case: case.installed("peft", "0.19.1"),
        r"peft is 0\.19\.1, and this code works with peft[<>=0-9.,]+ only\. .*pip install peft==",
    ),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that shows one model, behind a licence, and nothing else; it answers with the real hub's headers."""

    def do_GET(self):
        if self.path.startswith("/api/models/meta-llama/gated/tree/"):
            self.answer(
                200,
                "",
                json.dumps([{"type": "file", "path": "config.json", "size": 9, "oid": "0" * 40}]).encode(),
            )
        elif self.path.startswith("/api/models/meta-llama/gated"):
            body = json.dumps(
                {"id": "meta-llama/gated", "sha": "0" * 40, "siblings": [{"rfilename": "config.json"}]}
            )
            self.answer(200, "", body.encode())
        elif self.path.startswith("/meta-llama/gated/"):
            self.answer(403, "GatedRepo")
        else:
            self.answer(404, "RepoNotFound")

    do_HEAD = do_GET

    def answer(self, status, code, body=b"{}"):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def environment(hub: str, home: Path, path: str | None = None) -> dict:
    places = [path, os.environ.get("PYTHONPATH"), str(ROOT)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_ENDPOINT": hub,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
    }


def snapshot(folder: Path) -> dict:
    """Every file below a folder, with its time and what is in it."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def prepare(folder: Path) -> dict[str, Case]:
    cases = {}
    for number, (name, (spoil, _)) in enumerate(CASES.items()):
        case = cases[name] = Case(folder / f"case{number}")
        spoil(case)
        told = {
            "model": str(tiny_base()),
            "output_dir": str(case.folder / "out"),
            **SETTINGS,
            **case.settings,
        }
        case.file = case.folder / "train.yaml"
        case.file.write_text(yaml.safe_dump(told))
        case.before = snapshot(case.folder / "out")
    return cases


def fork(folder: Path, runs: list[dict], hub: str) -> dict[str, dict]:
    """Run the script on forked ranks, see tests/ranks/training.py; what came of each run, by name."""
    plan = {"folder": str(folder), "script": str(write_script(folder)), "runs": runs}
    (folder / "plan.json").write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/ranks/training.py"), str(folder / "plan.json")],
        env=environment(hub, folder / "home"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {run["name"]: json.loads((folder / f"{run['name']}.json").read_text()) for run in runs}


@pytest.fixture(scope="module")
def answered(tmp_path_factory, hub):
    """Every row of the table, run on two forked ranks: its case, and what came of it."""
    folder = tmp_path_factory.mktemp("bad")
    cases = prepare(folder)
    runs = [
        {
            "name": str(number),
            "out": str(case.folder / "out"),
            "fsdp": 1,
            "world": 2,
            "refuse": True,
            "args": ["--config", str(case.file)],
            "path": case.path,
            "variables": case.variables,
            "timeout": 60,
        }
        for number, case in enumerate(cases.values())
    ]
    seen = dict(zip(cases, fork(folder, runs, hub).values()))
    print("\nseconds on two ranks, imports aside")
    for name, row in seen.items():
        print(f"{row['seconds']:6.1f}  {name}")
    print(f"{statistics.median(row['seconds'] for row in seen.values()):6.1f}  median")
    return cases, seen


def last_words(output: str) -> str:
    """What stands at the end of a rank's output: the lines after the last frame of a traceback."""
    lines = output.rstrip().splitlines()
    while any(re.match(r"\s+(File |\^|~|raise |return )", line) for line in lines):
        lines = lines[1:]
    return lines[-1] if lines else ""


@pytest.mark.parametrize("cause", CASES)
def test_bad_input_is_refused_before_a_weight_is_read(answered, cause):
    cases, seen = answered
    case, row = cases[cause], seen[cause]
    assert all(status not in (0, 99) for status in row["status"]), (row["status"], row["output"])
    for output in row["output"]:
        assert re.search(CASES[cause][1], last_words(output)), output
        assert "was read." not in output
    assert snapshot(case.folder / "out") == case.before, "something in the output folder was touched"
    assert not list(case.folder.rglob("*.unfinished"))


# ---- two machines, each with an output folder of its own ------------------------------------------------------------

SAVED = SETTINGS | {"save_strategy": "steps", "save_steps": 1}


def machine(number: int, folder: Path, port: int, script: str, hub: str) -> subprocess.Popen:
    """What is typed on a machine; that both are this one makes no difference to `accelerate launch`."""
    file = variant(
        choose_config(1, rehearsal=True), folder, num_machines=2, num_processes=2, machine_rank=number,
        main_process_ip="127.0.0.1", main_process_port=port,
    )  # fmt: skip
    told = {**SAVED, "model": folder / "none"}  # nothing is there that could be read
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    command += ["-m", "nbutils.launching.rehearsal", script, *words(told, output_dir=folder / "runs/out")]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment(hub, folder / "home"), cwd=ROOT,
    )  # fmt: skip


def test_machines_that_do_not_share_the_output_folder_are_refused_before_a_weight_is_read(
    tmp_path, hub, script
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = [tmp_path / "first", tmp_path / "second"]
    folders[0].mkdir()
    (folders[1] / "runs/out").mkdir(parents=True)  # there on one machine, and still to be made on the other
    machines = [machine(number, folder, port, script, hub) for number, folder in enumerate(folders)]
    outputs = [process.communicate(timeout=90)[0] for process in machines]
    host = re.escape(socket.gethostname())
    for process, output in zip(machines, outputs):
        assert process.returncode == 1, output
        assert re.search(
            rf"output_dir {re.escape(str(folders[1]))}/runs/out is not one folder that all machines share: rank 1 on "
            rf"{host} has looked for 10 seconds .*Wanted: .* Name one on a file system that all machines mount\.",
            output,
        ), output
    assert not (folders[0] / "runs").exists() and not any((folders[1] / "runs/out").iterdir())
    assert ranks_of(script) == []


def test_a_token_that_comes_late_is_waited_for(tmp_path):
    here, there = (Token(tmp_path / "new/out", "token") for _ in range(2))
    late = threading.Timer(0.7, here.leave)
    late.start()
    there.look_for()
    late.join()
    assert here.made == [tmp_path / "new", tmp_path / "new/out"] and there.made == []
    here.take_away()
    assert not any(tmp_path.iterdir())
    with pytest.raises(Refused, match=r"has looked for 0\.1 seconds"):
        there.look_for(seconds=0.1)


# ---- the same, as a reader types it ---------------------------------------------------------------------------------


def typed(
    hub: str, folder: Path, *words: str, path: str | None = None
) -> tuple[subprocess.CompletedProcess, float]:
    """`python -m nbutils launch ...` in a terminal of its own; what it said, and the seconds."""
    command = [
        sys.executable,
        "-m",
        "nbutils",
        "launch",
        "--log",
        str(folder / "launch.log"),
        "--timeout",
        "120",
        *words,
    ]
    started = time.monotonic()
    done = subprocess.run(
        command,
        env=environment(hub, folder / "home", path),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
    )
    return done, time.monotonic() - started


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    return str(write_script(tmp_path_factory.mktemp("script")))


def test_a_bad_config_is_the_last_line_in_the_terminal(tmp_path, hub, script):
    file = variant(choose_config(1, rehearsal=True), tmp_path, fsdp_sharding_stratgy="FULL_SHARD")
    done, _ = typed(hub, tmp_path, "--config_file", str(file), script, "--config", "train.yaml")
    assert done.returncode == 1
    assert "knows no key fsdp_sharding_stratgy" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "launch.log").exists()


def test_a_port_in_use_is_the_last_line_in_the_terminal(tmp_path, hub, script):
    """One machine takes any free port; several must agree on one, and accelerate says if it is taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        file = variant(
            choose_config(1, rehearsal=True),
            tmp_path,
            num_machines=2,
            machine_rank=0,
            main_process_ip="127.0.0.1",
            main_process_port=port,
        )
        done, _ = typed(hub, tmp_path, "--config_file", str(file), script, "--config", "train.yaml")
    assert done.returncode == 1
    assert (
        f"port `{port}`, but another process is utilizing it. Please specify" in done.stderr.splitlines()[-1]
    )
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("cause", ["broken line", "empty row"])  # before a rank starts, and by the ranks
def test_bad_input_is_the_last_line_in_the_terminal(answered, tmp_path, hub, script, cause):
    case = answered[0][cause]
    done, _ = typed(hub, tmp_path, script, "--config", str(case.file), path=case.path)
    assert done.returncode == 1
    assert re.search(CASES[cause][1], done.stderr.splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert snapshot(case.folder / "out") == case.before


def test_the_runner_looks_before_it_executes_a_notebook(answered, tmp_path, hub):
    """Its parameters name a model and a file; notebook 04 would find them bad after all notebooks before it."""
    for cause, name in (("broken line", "dataset"), ("gated model", "model")):
        value = answered[0][cause].settings[name]
        done = subprocess.run(
            [sys.executable, "-m", "nbutils", "run", "--run-dir", str(tmp_path / "run"), "-p", name, value],
            env=environment(hub, tmp_path / "home"), cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 2
        assert re.search(CASES[cause][1], done.stderr.splitlines()[-1]), done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert not (tmp_path / "run").exists()


@pytest.mark.matrix
def test_the_whole_table_in_the_terminal(answered, tmp_path, hub, script):
    """Every row through a launch of its own, with the seconds that a reader waits."""
    rows = []

    def answer(cause, expected, *arguments, path=None):
        done, seconds = typed(hub, tmp_path, *arguments, path=path)
        last = done.stderr.splitlines()[-1]
        said = re.sub(r"/[^ ]*/pytest-of-[^/]+/pytest-\d+/[^/]+/", "", last).replace(
            f"{ROOT}/", ""
        )  # no machine's paths
        rows.append({"cause": cause, "status": done.returncode, "seconds": round(seconds, 1), "said": said})
        print(f"{seconds:6.1f}  {cause}: {last}", flush=True)
        assert done.returncode == 1 and re.search(expected, last), (cause, done.stderr)
        assert "Traceback" not in done.stdout + done.stderr

    for cause, (file, changes, expected) in CONFIGS.items():
        if cause not in GPUS:
            config = variant(ROOT / file, tmp_path, **changes)
            answer(cause, expected, "--config_file", str(config), script, "--config", "train.yaml")
    for cause, case in answered[0].items():
        if case.variables:  # of more machines than a terminal has
            continue
        answer(cause, CASES[cause][1], script, "--config", str(case.file), path=case.path)
        assert snapshot(case.folder / "out") == case.before
    median = round(statistics.median(row["seconds"] for row in rows), 1)
    record("refusals in the terminal", COMMAND, rows=rows, median_seconds=median)
    print(f"{median:6.1f}  median")


# ---- what works by design, and what only warns ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def accepted(tmp_path_factory, hub):
    """Runs that look like bad input and are none: they train a step, or are ended where they would read weights."""
    folder = tmp_path_factory.mktemp("good")
    quantise_checkpoint(tiny_base(), folder / "nf4")
    for file in (folder / "nf4").glob("*.safetensors"):
        as_uint8(file)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        told = json.loads((folder / "nf4" / name).read_text())
        told.pop("pad_token", None)
        (folder / "nf4" / name).write_text(json.dumps(told))
    (folder / "nf4/chat_template.jinja").unlink(missing_ok=True)
    (folder / "four.jsonl").write_text(GOOD * 4)
    (folder / "other.jsonl").write_text(GOOD.replace("shard", "rank"))
    case = Case(folder / "untested")
    case.installed("peft", "0.21.99")
    told = {**SETTINGS, "max_steps": 1, "max_length": 64, "max_cut_share": 1}
    runs = [
        {
            "name": "uint8",
            "out": "uint8",
            "fsdp": 1,
            "world": 2,
            "args": words(told, model=folder / "nf4", output_dir=folder / "uint8"),
        },
        {
            "name": "untested",
            "out": "untested",
            "fsdp": 1,
            "world": 1,
            "path": case.path,
            "args": words(told, model=tiny_base(), output_dir=case.folder / "new"),
        },
        {
            "name": "short",
            "out": "short",
            "fsdp": 1,
            "world": 1,
            "args": words(
                {**told, "max_steps": -1, "num_train_epochs": 1, "logging_steps": 500},
                model=tiny_base(),
                dataset=folder / "four.jsonl",
                heldout_dataset=folder / "other.jsonl",
                output_dir=folder / "short",
            ),
        },
        {
            "name": "shared",
            "out": str(folder / "runs/out"),
            "fsdp": 1,
            "world": 2,
            "refuse": True,
            "args": words(SAVED, model=tiny_base(), output_dir=folder / "runs/out"),
            "variables": {"LOCAL_WORLD_SIZE": "1"},  # each the only rank of its machine
        },
    ]
    return fork(folder, runs, hub) | {"folder": folder}


def words(settings: dict, **more) -> list[str]:
    return [word for name, value in {**settings, **more}.items() for word in (f"--{name}", str(value))]


def as_uint8(file: Path) -> None:
    """Store the packed weights as most of the hub does."""
    tensors = load_file(file)
    packed = {name: tensor for name, tensor in tensors.items() if f"{name}.absmax" in tensors}
    assert packed
    save_file(
        tensors | {name: tensor.contiguous().view(torch.uint8) for name, tensor in packed.items()},
        file,
        metadata={"format": "pt"},
    )


def test_nf4_stored_as_uint8_with_a_tokenizer_that_lacks_template_and_padding_trains(accepted):
    assert accepted["uint8"]["status"] == [0, 0], accepted["uint8"]["output"]


def test_rows_without_room_for_an_answer_are_counted(accepted):
    assert re.search(
        r"\d+ of 316 rows keep no token of their answer within max_length 64", accepted["uint8"]["output"][0]
    )


def test_an_epoch_shorter_than_the_first_line_of_the_log_ends_without_a_training_loss(accepted):
    assert accepted["short"]["status"] == [0], accepted["short"]["output"]
    training = json.loads((accepted["folder"] / "short/run.json").read_text())["training"]
    assert training["loss_first"] is None and training["loss_last"] is None
    assert training["held_out_loss_after"] > 0


@pytest.mark.parametrize(
    "logs", [{"logging_strategy": "epoch"}, {"logging_first_step": True}, {"max_steps": -1}]
)
def test_what_logs_a_loss_in_another_way_is_not_refused_for_its_logging_steps(logs, tmp_path):
    recipe = SimpleNamespace(lora_r=4, compile_layers=False, embeddings_on_host=False)
    told = {"output_dir": str(tmp_path), "max_steps": 5, "logging_steps": 500, "bf16": False, "use_cpu": True}
    kwargs = {"gradient_checkpointing": None, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    refusing._refuse_settings(recipe, SFTConfig(**told | kwargs | logs))


def test_machines_that_share_the_output_folder_go_on_and_nothing_is_left_in_it(accepted):
    assert accepted["shared"]["status"] == [99, 99], accepted["shared"]["output"]
    folder = accepted["folder"]
    assert (folder / "plan.json").exists() and not (folder / "runs").exists()


def test_an_untested_version_is_a_warning(accepted):
    assert accepted["untested"]["status"] == [0], accepted["untested"]["output"]
    assert "Not tested together: peft 0.21.99 (tested: " in accepted["untested"]["output"][0]


def test_hybrid_where_each_rank_sees_one_of_the_gpus_is_refused(monkeypatch):
    """As a scheduler shows them that binds a GPU to each task; FSDP 1 would take each rank for a machine."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for name, value in {"ACCELERATE_USE_FSDP": "true", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_SHARDING_STRATEGY", "FULL_SHARD")
    refusing._refuse_hybrid_of_other_groups()
    for spelling in SPELLINGS:
        monkeypatch.setenv("FSDP_SHARDING_STRATEGY", spelling)
        with pytest.raises(
            Refused, match=rf"is {spelling} with 2 ranks a machine, each of which sees 1 device; "
        ):
            refusing._refuse_hybrid_of_other_groups()
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        refusing._refuse_hybrid_of_other_groups()
        monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("FSDP_VERSION", "2")  # which reads no strategy
    refusing._refuse_hybrid_of_other_groups()


def test_a_card_without_bf16_is_refused(tmp_path, monkeypatch):
    """No such card is here: the doctor is shown one by a program in the place of nvidia-smi, the script by torch."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'Tesla T4, 15360, 7.5'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    with_card = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "nbutils", "doctor"],
        env=with_card,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert re.search(r"FAIL bf16 +compute capability 7\.5\n.*needs compute capability 8\.0", done.stdout)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")
    with pytest.raises(Refused, match=r"Tesla T4 cannot compute in bf16, .* compute capability 8\.0"):
        refusing._refuse_settings(SimpleNamespace(lora_r=4), SimpleNamespace(mixed_precision="no"))
