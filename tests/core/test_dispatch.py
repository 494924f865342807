"""Who serves a call: precedence, names, refusals, `explain`, `record`, logging, `experimental`."""

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_ops
from fused_ops.core import device, dispatch, extension
from fused_ops.core.dispatch import use_backend
from tests.support import randn

X = randn(3)


def fake_cuda(*shape):
    with FakeTensorMode():
        return torch.empty(*shape, device="cuda")


# argument, context, environment -> served; auto takes cpu here.
PRECEDENCE = [
    (None, None, None, "cpu"),
    (None, None, "reference", "reference"),
    (None, None, "auto", "cpu"),
    (None, None, "", "cpu"),
    (None, "reference", None, "reference"),
    (None, "reference", "cpu", "reference"),
    (None, "cpu", "reference", "cpu"),
    (None, "auto", "reference", "cpu"),
    ("reference", None, None, "reference"),
    ("reference", "cpu", "cpu", "reference"),
    ("cpu", "reference", "reference", "cpu"),
    ("auto", "reference", "reference", "cpu"),
]


@pytest.mark.parametrize(("argument", "context", "environment", "wanted"), PRECEDENCE)
def test_argument_beats_context_beats_environment_beats_auto(
    make_op, served, monkeypatch, argument, context, environment, wanted
):
    scaled = make_op("cpu", "reference")
    if environment is not None:
        monkeypatch.setenv("FUSED_OPS_BACKEND", environment)
    if context is None:
        assert served(scaled, X, argument) == wanted
    else:
        with use_backend(context):
            assert served(scaled, X, argument) == wanted


def test_none_in_the_context_resets_to_auto(make_op, served, monkeypatch):
    scaled = make_op("cpu", "reference")
    monkeypatch.setenv("FUSED_OPS_BACKEND", "reference")
    with use_backend("reference"), use_backend(None):
        assert served(scaled, X) == "cpu"


def test_contexts_nest_and_end_with_an_exception(make_op, served):
    scaled = make_op("cpu", "reference")
    with use_backend("reference"):
        with pytest.raises(KeyError), use_backend("cpu"):
            assert served(scaled, X) == "cpu"
            raise KeyError
        assert served(scaled, X) == "reference"
    assert served(scaled, X) == "cpu"


def test_a_context_object_can_be_entered_again_and_inside_itself(make_op, served):
    scaled, context = make_op("cpu", "reference"), use_backend("reference")
    with context, context:
        assert served(scaled, X) == "reference"
    assert served(scaled, X) == "cpu"
    with context:
        assert served(scaled, X) == "reference"
    assert served(scaled, X) == "cpu"


def test_the_environment_is_read_at_every_call(make_op, served, monkeypatch):
    scaled = make_op("cpu", "reference")
    assert served(scaled, X) == "cpu"
    monkeypatch.setenv("FUSED_OPS_BACKEND", "reference")
    assert served(scaled, X) == "reference"
    monkeypatch.delenv("FUSED_OPS_BACKEND")
    assert served(scaled, X) == "cpu"


@pytest.mark.parametrize("name", ["tritn", "CUDA", " cpu", 3])
def test_an_unknown_name_is_a_value_error_that_names_backend(make_op, monkeypatch, name):
    scaled = make_op("cpu", "reference")
    with pytest.raises(ValueError, match=r"backend must be one of cuda, triton, cpu, reference.* got ") as caught:
        scaled(X, backend=name)
    assert repr(name) in str(caught.value)
    with pytest.raises(ValueError, match="backend must be one of"):
        use_backend(name)
    monkeypatch.setenv("FUSED_OPS_BACKEND", str(name))
    with pytest.raises(ValueError, match=r"FUSED_OPS_BACKEND.*backend"):
        scaled(X)
    assert scaled.calls == []


def test_an_unknown_name_does_not_change_the_context(make_op, served):
    scaled = make_op("cpu", "reference")
    with use_backend("reference"):
        with pytest.raises(ValueError, match="backend"), use_backend("nonsense"):
            pass
        assert served(scaled, X) == "reference"


@pytest.mark.parametrize("how", ["context", "environment"])
def test_context_and_environment_bind_only_the_ops_that_have_the_backend(make_op, served, monkeypatch, how):
    with_cpu, without = (
        make_op("cpu", "reference", cpu={"worthwhile": lambda x: "is slower"}),
        make_op("reference", op="other"),
    )
    if how == "environment":
        monkeypatch.setenv("FUSED_OPS_BACKEND", "cpu")
    with use_backend("cpu") if how == "context" else use_backend_untouched():
        assert served(with_cpu, X) == "cpu"
        assert served(without, X) == "reference"


class use_backend_untouched:  # noqa: N801 - stands where use_backend stands
    def __enter__(self):
        pass

    def __exit__(self, *error):
        pass


def test_an_argument_that_names_a_backend_the_op_lacks_is_refused(make_op):
    scaled = make_op("cpu", "reference")
    with pytest.raises(fused_ops.BackendUnavailable, match="scaled has no cuda backend, it has cpu, reference"):
        scaled(X, backend="cuda")
    assert scaled.calls == []


@pytest.mark.parametrize("how", ["backend=", "use_backend", "FUSED_OPS_BACKEND"])
def test_a_request_by_name_never_falls_back_and_carries_the_reason(make_op, monkeypatch, how):
    scaled = make_op("cpu", "reference", cpu={"supports": lambda x: "takes even lengths only" if len(x) % 2 else None})
    if how == "FUSED_OPS_BACKEND":
        monkeypatch.setenv("FUSED_OPS_BACKEND", "cpu")
    with (
        use_backend("cpu" if how == "use_backend" else None) if how != "FUSED_OPS_BACKEND" else use_backend_untouched()
    ):
        argument = "cpu" if how == "backend=" else None
        with pytest.raises(fused_ops.BackendUnavailable, match="takes even lengths only") as caught:
            scaled(X, backend=argument)
        assert str(caught.value).startswith("scaled: ")
        assert how in str(caught.value)
        assert isinstance(caught.value, RuntimeError)
        assert scaled.calls == []
        scaled(randn(4), backend=argument)
        assert scaled.calls == ["cpu"]


def test_auto_takes_the_first_that_supports_the_call_and_is_worth_it(make_op, served):
    small, odd = (lambda x: "is slower below 4" if len(x) < 4 else None), lambda x: "is odd" if len(x) % 2 else None
    scaled = make_op("cpu", "reference", cpu={"supports": odd, "worthwhile": small})
    assert served(scaled, randn(4)) == "cpu"
    assert served(scaled, randn(5)) == "reference"
    assert served(scaled, randn(2)) == "reference"
    assert served(scaled, randn(2), "cpu") == "cpu"  # a request by name is not asked whether it is worth it


@pytest.mark.parametrize(
    ("name", "tensor", "prepare", "reason"),
    [
        ("cuda", "cpu", {}, "needs a tensor on a GPU"),
        ("triton", "cpu", {"TRITON_INTERPRETED": False, "TRITON_INSTALLED": True}, "needs a tensor on a GPU"),
        ("triton", "cuda", {"TRITON_INSTALLED": False}, "triton is not installed"),
        ("cpu", "cuda", {}, "needs a tensor on the CPU"),
        ("cuda", "cuda", {"architecture_missing": lambda index: "_C.so was built for 8.0, this one is sm_90"}, "sm_90"),
    ],
)
def test_a_backend_that_is_not_there_says_why(make_op, monkeypatch, name, tensor, prepare, reason):
    scaled = make_op(name, "reference")
    for attribute, value in prepare.items():
        monkeypatch.setattr(device, attribute, value)
    x = X if tensor == "cpu" else fake_cuda(3)
    with pytest.raises(fused_ops.BackendUnavailable, match=reason):
        scaled(x, backend=name)
    scaled(x)
    assert scaled.calls == ["reference"]


@pytest.mark.parametrize("stored", [None, "_C.so did not load: truncated"])
def test_a_kernel_that_is_not_registered_is_refused_with_the_stored_reason(make_op, monkeypatch, stored):
    monkeypatch.setattr(extension, "kernels_missing", stored)
    monkeypatch.setattr(extension, "_registered", set())
    with torch.library._scoped_library("fused_ops", "FRAGMENT") as library:
        library.define("schema_alone(Tensor x) -> Tensor")
        scaled = make_op("cpu", "reference", cpu={"needs": "schema_alone"})
        with pytest.raises(fused_ops.BackendUnavailable, match=stored or "_C.so was built without cpu kernels"):
            scaled(X, backend="cpu")
        scaled(X)
        assert scaled.calls == ["reference"]
        library.impl("schema_alone", lambda x: x, "CPU")
        scaled(X, backend="cpu")
        assert scaled.calls == ["reference", "cpu"]


def test_emulation_gives_cpu_tensors_to_cuda_by_name_only(make_op, monkeypatch):
    monkeypatch.setattr(extension, "EMULATED", True)
    scaled = make_op("cuda", "cpu", "reference")
    scaled(X)
    with dispatch.record() as choices:
        scaled(X, backend="cuda")
    assert scaled.calls == ["cpu", "cuda"]
    assert [choice.backend for choice in choices] == ["cuda (emulated)"]
    assert fused_ops.explain(scaled, X).rows[0] == ("cuda (emulated)", "refused", "is taken by name only")
    assert fused_ops.explain(scaled, X).chosen == "cpu"
    assert fused_ops.explain(scaled, X, backend="cuda").chosen == "cuda (emulated)"
    monkeypatch.setattr(device, "architecture_missing", lambda index: None)
    scaled(fake_cuda(3))
    assert fused_ops.explain(scaled, fake_cuda(3)).rows[0] == ("cuda", "chosen", "")


def test_a_kernel_the_emulator_lacks_is_refused_with_the_stored_reason(make_op, monkeypatch):
    monkeypatch.setattr(extension, "EMULATED", True)
    monkeypatch.setattr(extension, "_registered", set())
    with torch.library._scoped_library("fused_ops", "FRAGMENT") as library:
        library.define("emulated_schema_alone(Tensor x) -> Tensor")
        scaled = make_op("cuda", "reference", cuda={"needs": "emulated_schema_alone"})
        for stored in ("_emu.so was not built: make emulate", None):
            monkeypatch.setattr(extension, "emulator_missing", stored)
            with pytest.raises(fused_ops.BackendUnavailable, match=stored or "_emu.so was built without it"):
                scaled(X, backend="cuda")


def test_explain_rows_name_every_backend_with_verdict_and_reason(make_op):
    scaled = make_op("cuda", "cpu", "reference")
    found = fused_ops.explain(scaled, X)
    assert found.op == "scaled"
    assert found.chosen == "cpu"
    assert found.rows == (
        ("cuda", "refused", "needs a tensor on a GPU"),
        ("cpu", "chosen", ""),
        ("reference", "passed", "cpu comes first"),
    )
    text = str(found)
    assert text.splitlines()[0] == "scaled: cpu"
    assert [line.split()[:2] for line in text.splitlines()[1:]] == [
        ["cuda", "refused"], ["cpu", "chosen"], ["reference", "passed"]
    ]  # fmt: skip


def test_explain_computes_logs_and_records_nothing(make_op, caplog):
    scaled = make_op("cpu", "reference")
    with caplog.at_level(logging.DEBUG, "fused_ops"), dispatch.record() as choices:
        fused_ops.explain(scaled, X)
        fused_ops.explain(scaled, X, backend="reference")
    assert scaled.calls == [] and choices == [] and caplog.records == []
    scaled(X)
    assert scaled.calls == ["cpu"]


def test_explain_of_a_request_says_where_it_came_from(make_op, monkeypatch):
    scaled = make_op("cpu", "reference", cpu={"supports": lambda x: "never"})
    assert fused_ops.explain(scaled, X, backend="reference").rows[1] == (
        "reference", "chosen", "asked for by backend="
    )  # fmt: skip
    with use_backend("reference"):
        assert fused_ops.explain(scaled, X).rows[1][2] == "asked for by use_backend"
    refused = fused_ops.explain(scaled, X, backend="cpu")
    assert refused.chosen is None
    assert refused.rows[0] == ("cpu", "refused", "never")
    assert "nothing serves this call" in str(refused)
    lacking = fused_ops.explain(scaled, X, backend="cuda")
    assert lacking.chosen is None
    assert lacking.rows[-1] == ("cuda", "refused", "scaled has no cuda backend")


def test_explain_adds_a_backends_note_where_it_is_chosen(make_op):
    scaled = make_op("cpu", "reference", reference={"note": "in its own way"}, cpu={"note": "unseen"})
    rows = fused_ops.explain(scaled, X, backend="reference").rows
    assert rows == (
        ("cpu", "passed", "reference comes first"),
        ("reference", "chosen", "asked for by backend=; in its own way"),
    )
    scaled = make_op("reference", reference={"note": "in its own way"})
    assert fused_ops.explain(scaled, X).rows == (("reference", "chosen", "in its own way"),)


def test_explain_agrees_with_what_runs(make_op, served, monkeypatch):
    for worthwhile in (lambda x: None, lambda x: "is slower here"):
        scaled = make_op("cpu", "reference", cpu={"worthwhile": worthwhile})
        for argument in (None, "cpu", "reference", "auto"):
            assert fused_ops.explain(scaled, X, backend=argument).chosen == served(scaled, X, argument)


def test_explain_looks_into_a_module_and_raises_the_functions_own_errors(make_op):
    scaled = make_op("cpu", "reference")

    class Module(torch.nn.Module):
        def forward(self, x):
            try:
                return scaled(x) + 1
            except Exception:
                return x

    assert fused_ops.explain(Module(), X).chosen == "cpu"
    with pytest.raises(ValueError, match="key must be"):
        fused_ops.explain(fused_ops.scaled_dot_product_attention, randn(1, 2, 3), randn(1, 2, 4), randn(1, 2, 3))
    scaled(X)
    assert scaled.calls == ["cpu"]


def test_explain_of_something_else_is_an_error(make_op):
    with pytest.raises(ValueError, match="fn must be a function or module of fused_ops"):
        fused_ops.explain(torch.relu, X)
    scaled = make_op("cpu", "reference")
    scaled(X)
    assert scaled.calls == ["cpu"]


def test_record_collects_every_choice_with_its_reason(make_op):
    scaled = make_op("cpu", "reference", cpu={"supports": lambda x: "is odd" if len(x) % 2 else None})
    with dispatch.record() as choices:
        scaled(randn(4))
        scaled(X)
        scaled(X)
        scaled(X, backend="reference")
    scaled(X)
    assert [choice.backend for choice in choices] == ["cpu", "reference", "reference", "reference"]
    assert {choice.op for choice in choices} == {"scaled"}
    assert "cpu is odd" in choices[1].reason
    assert choices[3].reason == "asked for by backend="


def test_recordings_nest(make_op):
    scaled = make_op("cpu", "reference")
    with dispatch.record() as outer:
        with dispatch.record() as inner:
            pass
        scaled(X)
    assert inner == []
    assert [choice.backend for choice in outer] == ["cpu"]


def test_an_op_with_reference_alone_is_recorded_too(make_op):
    scaled = make_op("reference")
    with dispatch.record() as choices:
        scaled(X)
        scaled(X)
    assert [choice.backend for choice in choices] == ["reference"] * 2


def test_auto_logs_once_per_op_and_reason_at_info(make_op, caplog):
    first = make_op("cpu", "reference", cpu={"supports": lambda x: f"never {len(x)}"})
    second = make_op("reference", op="second")
    with caplog.at_level(logging.INFO, "fused_ops"):
        for _ in range(3):
            first(X)
            first(randn(4))
            second(X)
    assert [record.levelname for record in caplog.records] == ["INFO"] * 3
    messages = [record.getMessage() for record in caplog.records]
    assert ["first" in m or "scaled" in m for m in messages] == [True, True, False]
    assert "never 3" in messages[0] and "never 4" in messages[1]
    assert "second" in messages[2] and "reference" in messages[2]


def test_a_request_by_name_is_not_logged(make_op, caplog):
    scaled = make_op("cpu", "reference")
    with caplog.at_level(logging.INFO, "fused_ops"):
        scaled(X, backend="reference")
    assert caplog.records == []


def test_a_fall_to_reference_on_a_gpu_is_one_warning(make_op, caplog):
    scaled = make_op("cuda", "reference", cuda={"supports": lambda x: "takes half types only"})
    with caplog.at_level(logging.INFO, "fused_ops"):
        scaled(fake_cuda(3))
        scaled(fake_cuda(3))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "takes half types only" in caplog.text


def test_a_gpu_kernel_that_serves_is_logged_at_info(make_op, caplog):
    scaled = make_op("cuda", "reference")
    with caplog.at_level(logging.INFO, "fused_ops"):
        scaled(fake_cuda(3))
    assert scaled.calls == ["cuda"]
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_an_experimental_kernel_is_never_taken_by_auto_but_by_name(make_op, gpu_kernel):
    scaled = make_op("cuda", "reference", cuda={"kernel": gpu_kernel.kernel})
    x = fake_cuda(3)
    scaled(x)
    scaled(x, backend="cuda")
    with use_backend("cuda"):
        scaled(x)
    assert scaled.calls == ["reference", "cuda", "cuda"]
    row = fused_ops.explain(scaled, x).rows[0]
    assert row[:2] == ("cuda", "refused")
    assert "experimental" in row[2]


def test_a_verified_kernel_is_taken_until_its_source_changes(make_op, gpu_kernel):
    scaled = make_op("cuda", "reference", cuda={"kernel": gpu_kernel.kernel})
    gpu_kernel.verify()
    scaled(fake_cuda(3))
    gpu_kernel.edit()
    scaled(fake_cuda(3))
    assert scaled.calls == ["cuda", "reference"]


def test_a_choice_is_remembered_by_its_key_where_nobody_looks(make_op):
    asked = []

    def pays(x):
        asked.append(len(x))
        return None if len(x) > 2 else "is for more than 2"

    scaled = make_op("cpu", "reference", cpu={"worthwhile": pays})

    def served(x):
        scaled.op.remembered((x.shape,), (x,), x)
        return scaled.calls[-1]

    with torch.no_grad():
        assert [served(randn(n)) for n in (3, 2, 3, 2)] == ["cpu", "reference", "cpu", "reference"]
        assert asked == [3, 2]
        with use_backend("reference"):
            assert served(randn(3)) == "reference"
        with dispatch.record() as choices:
            assert served(randn(3)) == "cpu"
        assert choices[0].backend == "cpu" and asked == [3, 2, 3]
        assert served(torch.nn.Parameter(randn(3), requires_grad=False)) == "cpu" and len(asked) == 4
    served(randn(3))  # gradients may be wanted
    assert len(asked) == 5
