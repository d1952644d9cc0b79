"""The preflight must say what FSDP 1 really does: each combination is predicted, then wrapped on one process."""

import functools
import itertools
from collections import Counter
from typing import NamedTuple

import bitsandbytes.nn.modules
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import (
    ModuleWrapPolicy,
    size_based_auto_wrap_policy,
    transformer_auto_wrap_policy,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from nbutils.models.nf4 import nf4_config
from nbutils.training.fsdp_refusals import FIXES, GROUP_DTYPE
from nbutils.training.preflight import PreflightError, preflight
from nbutils.training.prep import prepare_for_fsdp_qlora

pytestmark = pytest.mark.filterwarnings("ignore")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "tied": {},
    "tied, embeddings saved": {"modules_to_save": ["embed_tokens"]},
}


class Case(NamedTuple):
    prep: str
    storage: torch.dtype
    adapter: torch.dtype
    policy: str
    use_orig_params: bool
    kind: str


CASES = [
    Case(*choice)
    for choice in itertools.product(
        ("custom", "kbit"),
        (torch.bfloat16, torch.float32, torch.uint8),
        (torch.bfloat16, torch.float32),
        ("peft", "layers", "object", "size", "none"),
        (False, True),
        KINDS,
    )
]


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """A process group of one, and 4-bit weights that stay in order on CPUs with AVX512-BF16."""
    kept = bitsandbytes.nn.modules.has_avx512bf16
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    bitsandbytes.nn.modules.has_avx512bf16 = kept


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders with a two-layer Llama of random weights, untied and tied."""
    folders = {}
    for tied in (False, True):
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=tied,
        )  # fmt: skip
        folders[tied] = tmp_path_factory.mktemp("base")
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folders[tied])
    return folders


def build(case: Case, bases) -> torch.nn.Module:
    base = AutoModelForCausalLM.from_pretrained(
        bases[case.kind.startswith("tied")],
        quantization_config=nf4_config(case.storage),
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
    )
    if case.prep == "custom":
        prepare_for_fsdp_qlora(base)
    else:
        prepare_model_for_kbit_training(base)
    adapter = LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM", **KINDS[case.kind])
    model = get_peft_model(base, adapter)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(case.adapter)
    return model


def policy_of(name: str, model):
    if name == "peft":
        return fsdp_auto_wrap_policy(model)
    if name == "layers":
        return functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    if name == "object":
        return ModuleWrapPolicy({LlamaDecoderLayer})
    if name == "size":
        return functools.partial(size_based_auto_wrap_policy, min_num_params=3000)
    return None


def wrap(model, policy, use_orig_params: bool):
    return FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), auto_wrap_policy=policy, use_orig_params=use_orig_params
    )


@pytest.fixture(scope="module")
def outcomes(bases):
    """For each case: (case, report, FSDP's error or None, names in each real unit)."""
    rows = []
    for case in CASES:
        model = build(case, bases)
        policy = policy_of(case.policy, model)
        report = preflight(model, policy, 1, case.use_orig_params)
        try:
            wrapped = wrap(model, policy, case.use_orig_params)
            units = [
                list(m._flat_param._fqns) for m in FullyShardedDataParallel.fsdp_modules(wrapped) if m._handle
            ]
            rows.append((case, report, None, units))
        except ValueError as error:
            rows.append((case, report, str(error), []))
    return rows


def test_the_preflight_agrees_with_fsdp_on_every_combination(outcomes):
    assert len(outcomes) >= 60
    wrong = [
        (case, [str(p) for p in report.problems[:1]], said)
        for case, report, said, _ in outcomes
        if report.ok != (said is None) or (said and not said.startswith(report.problems[0].message))
    ]
    assert not wrong, f"{len(wrong)} of {len(outcomes)} disagree, first: {wrong[0]}"


def test_it_names_the_same_parameters_in_each_unit(outcomes):
    for case, report, said, units in outcomes:
        if said is None:
            ours = sorted(
                [name.removeprefix(unit.name).lstrip(".") for name in unit.parameters]
                for unit in report.units
                if unit.parameters
            )
            assert ours == sorted(units), case


def test_each_cause_and_success_are_met_often_enough(outcomes):
    met = Counter(report.problems[0].cause if report.problems else "ok" for _, report, _, _ in outcomes)
    for cause in ("ok", "integer dtype", "mixed dtypes", "mixed requires_grad"):
        assert met[cause] >= 5, met


def test_the_parameter_at_fault_is_the_odd_one_out(outcomes):
    for _, report, _, _ in outcomes:
        for problem in report.problems:
            unit = next(unit for unit in report.units if unit.name == problem.unit)
            at_fault = unit.parameters[problem.parameter]
            before = list(unit.parameters.values())[: list(unit.parameters).index(problem.parameter)]
            if problem.cause == "integer dtype":
                assert not at_fault.is_floating_point()
            elif problem.cause == "mixed dtypes":
                assert {parameter.dtype for parameter in before} == {before[0].dtype} != {at_fault.dtype}
            else:
                assert 0 < unit.trainable < len(unit.parameters)
            assert problem.fix == FIXES[problem.cause]


def test_the_mend_mends(bases):
    """The default of the course wraps; each single step away from it does not."""
    good = Case("custom", torch.bfloat16, torch.bfloat16, "peft", False, "lora")
    model = build(good, bases)
    preflight(model, fsdp_auto_wrap_policy(model)).raise_if_bad()
    for change, cause in (
        ({"prep": "kbit"}, "mixed dtypes"),
        ({"storage": torch.uint8}, "integer dtype"),
        ({"storage": torch.float32}, "mixed dtypes"),
        ({"policy": "layers"}, "mixed requires_grad"),
    ):
        case = good._replace(**change)
        model = build(case, bases)
        report = preflight(model, policy_of(case.policy, model))
        with pytest.raises(PreflightError, match=cause) as caught:
            report.raise_if_bad()
        assert "model.layers.0" in str(caught.value) and "What to do" in str(caught.value)


def test_it_reads_meta_tensors_and_leaves_the_model_as_it_was():
    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=2, num_attention_heads=64,
                         num_key_value_heads=8, vocab_size=128256)  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).requires_grad_(False)
    before = [type(module) for module in model.modules()]
    report = preflight(model, policy_of("layers", model))
    assert report.ok and len(report.units) == 3
    assert report.units[0].bytes == 2 * sum(p.numel() for p in model.model.layers[0].parameters())
    assert [type(module) for module in model.modules()] == before


def test_fsdp2_takes_the_cast_but_not_two_trainable_dtypes_in_one_unit(bases):
    """FSDP 2 accepts the standard prep, and refuses a DoRA magnitude in fp32 beside bf16 factors: in the forward."""
    layers = policy_of("layers", None)
    cast = build(Case("kbit", torch.bfloat16, torch.bfloat16, "layers", False, "lora"), bases)
    assert preflight(cast, layers, fsdp_version=2).ok
    assert forward_under_fsdp2(cast) is None
    dora = build(Case("custom", torch.bfloat16, torch.bfloat16, "layers", False, "dora"), bases)
    for name, parameter in dora.named_parameters():
        if "magnitude" in name:
            parameter.data = parameter.data.float()
    report = preflight(dora, layers, fsdp_version=2)
    said = forward_under_fsdp2(dora)
    assert (
        report.problems[0].cause == "mixed trainable dtypes" and "magnitude" in report.problems[0].parameter
    )
    assert said.startswith(GROUP_DTYPE.split("{")[0]) and "float32" in said and "bfloat16" in said


def forward_under_fsdp2(model) -> str | None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for module in [m for m in model.modules() if isinstance(m, LlamaDecoderLayer)] + [model]:
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy())
    tokens = torch.arange(8)[None]
    try:
        model(input_ids=tokens, labels=tokens)
    except AssertionError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("compute", "loss_is_right"), [(torch.float16, True), (torch.bfloat16, False)])
def test_a_cast_of_packed_bytes_is_refused_because_fsdp2_would_not(bases, compute, loss_is_right):
    """16-bit storage gathered in the other 16-bit dtype: FSDP 2 trains on weights that nobody has loaded."""
    case = Case("custom", torch.float16, torch.bfloat16, "layers", False, "lora")
    tokens = torch.arange(32)[None]
    alone = build(case, bases)
    right = alone(input_ids=tokens, labels=tokens).loss.item()
    model = build(case, bases)
    report = preflight(model, policy_of("layers", model), 2, compute_dtype=compute)
    assert report.ok == loss_is_right
    if not loss_is_right:
        with pytest.raises(PreflightError, match=r"base_layer.weight does not fit"):
            report.raise_if_bad()
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for module in [m for m in model.modules() if isinstance(m, LlamaDecoderLayer)] + [model]:
        fully_shard(
            module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=compute)
        )
    loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert (abs(loss - right) < 0.005) == loss_is_right, (loss, right)


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_tied_weights_in_two_units(use_orig_params):
    """FSDP 1 copies a tied weight into both units, or, with use_orig_params, leaves it in the first one alone."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    policy = ModuleWrapPolicy({torch.nn.Embedding})
    report = preflight(model, policy, use_orig_params=use_orig_params)
    wrapped = wrap(model, policy, use_orig_params)
    real = [set(m._flat_param._fqns) for m in FullyShardedDataParallel.fsdp_modules(wrapped)]
    assert (
        ("lm_head.weight" in report.units[-1].parameters)
        == ("lm_head.weight" in real[0])
        == (not use_orig_params)
    )
    assert bool(report.warnings) == (not use_orig_params)


def test_it_warns_of_rounded_rotary_frequencies(bases):
    case = Case("custom", torch.bfloat16, torch.bfloat16, "layers", True, "lora")
    policy = policy_of("layers", None)
    assert not preflight(build(case, bases), policy, 1, compute_dtype=torch.bfloat16).warnings
    plain = build(case._replace(prep="kbit"), bases)
    assert any(
        "rotary" in text for text in preflight(plain, policy, 1, compute_dtype=torch.bfloat16).warnings
    )
    assert not preflight(plain, policy, 2, compute_dtype=torch.bfloat16).warnings
    with pytest.raises(ValueError, match="fsdp_version=3"):
        preflight(plain, policy, fsdp_version=3)


def test_the_table_has_a_line_for_each_kind_of_unit(bases):
    model = build(Case("kbit", torch.bfloat16, torch.bfloat16, "peft", False, "lora"), bases)
    lines = preflight(model, fsdp_auto_wrap_policy(model)).table().splitlines()
    assert lines[0].startswith("units") and len(lines) < 12
    assert any(
        "LlamaDecoderLayer" in line and "mixed dtypes" in line and line.startswith("2") for line in lines
    )
