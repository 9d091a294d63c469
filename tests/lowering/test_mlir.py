"""MLIR: text of a Sinkhorn and of a site, all models through both engines, the backend option, what is refused.

Runs where torch-mlir is installed; what needs IREE, where IREE is.
"""

from __future__ import annotations

import builtins
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import mhc_compile
from mhc_compile import ops
from mhc_compile.backend import reports
from mhc_compile.errors import MissingDependencyError, OptionError
from mhc_compile.lowering import mlir
from tests.tiny import ids, tiny

pytest.importorskip("torch_mlir.fx", reason="needs torch-mlir")
assert_expected_inline = pytest.importorskip("expecttest", reason="needs expecttest").assert_expected_inline

TOLERANCE = 1e-5


def needs_iree() -> None:
    pytest.importorskip("iree.compiler", reason="needs IREE")
    pytest.importorskip("iree.runtime", reason="needs IREE")


def difference(have: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """Largest difference of any output, relative to the largest value of that output."""
    assert len(have) == len(want)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(have, want, strict=True))


class Sinkhorn(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return ops.sinkhorn(logits, **ops.SinkhornSpec(steps=2, eps=0.0).op_arguments())


class Site(nn.Module):
    """One site around the branch y = tanh(u)."""

    def __init__(self, streams: int = 2, width: int = 3) -> None:
        super().__init__()
        self.spec = ops.CoefficientSpec(streams=streams, sinkhorn=ops.SinkhornSpec(steps=2))
        rows = self.spec.rows
        self.phi, self.bias = nn.Parameter(torch.randn(rows, streams * width)), nn.Parameter(torch.randn(rows))
        self.alpha = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        scales = (self.alpha, self.alpha, self.alpha)
        pre, post, res, _ = ops.coefficients(x, self.phi, self.bias, *scales, **self.spec.op_arguments())
        return ops.post(x, torch.tanh(ops.pre(x, pre)), post, res, False)


def graph_of(module: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """The module's own graph, with its semantic ops as nodes."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return False

    return fx.GraphModule(module, Tracer().trace(module))


def steps(text: str) -> str:
    """The text without the bodies of its loops: an operation a line, without names and maps."""
    kept = []
    inside = False
    for line in text.splitlines():
        if inside:
            inside = not line.strip().startswith("} ->")
            if inside:
                operation = re.search(r"= (?:arith|math)\.(\w+)", line)
                if operation:
                    kept[-1] += f" {operation[1]}"
            else:
                kept[-1] += f" {line.strip()[2:]}"
        elif "linalg.generic" in line:
            kept.append("linalg.generic")
            inside = True
        elif match := re.search(r"= (linalg\.\w+|tensor\.(?:expand|collapse|extract|insert)\w+)", line):
            kept.append(f"{match[1]} -> {re.findall(r'tensor<[^>]+>', line)[-1]}")
    return "\n".join(kept)


# ------------------------------------------------------------------------------------------------ text
def test_the_linalg_of_a_sinkhorn() -> None:
    logits = torch.randn(3, 2, 2)
    text = str(mlir.to_mlir(graph_of(Sinkhorn()), logits))
    assert_expected_inline(
        text,
        """\
#map = affine_map<(d0, d1, d2) -> (d0, d1, d2)>
#map1 = affine_map<(d0, d1, d2) -> (d0, d1)>
#map2 = affine_map<(d0, d1, d2) -> (d0, d1, 0)>
#map3 = affine_map<(d0, d1, d2) -> (d0, 0, d2)>
module {
  func.func @main(%arg0: tensor<3x2x2xf32>) -> tensor<3x2x2xf32> {
    %c0_i64 = arith.constant 0 : i64
    %cst = arith.constant 0xFF800000 : f32
    %cst_0 = arith.constant 0.000000e+00 : f32
    %cst_1 = arith.constant 9.9999999999999995E-7 : f64
    %0 = tensor.empty() : tensor<3x2xi64>
    %1 = linalg.fill ins(%c0_i64 : i64) outs(%0 : tensor<3x2xi64>) -> tensor<3x2xi64>
    %2 = tensor.empty() : tensor<3x2xf32>
    %3 = linalg.fill ins(%cst : f32) outs(%2 : tensor<3x2xf32>) -> tensor<3x2xf32>
    %4:2 = linalg.generic {indexing_maps = [#map, #map1, #map1], iterator_types = ["parallel", "parallel", "reduction"]} ins(%arg0 : tensor<3x2x2xf32>) outs(%3, %1 : tensor<3x2xf32>, tensor<3x2xi64>) {
    ^bb0(%in: f32, %out: f32, %out_2: i64):
      %19 = linalg.index 2 : index
      %20 = arith.index_cast %19 : index to i64
      %21 = arith.maximumf %in, %out : f32
      %22 = arith.cmpf ogt, %in, %out : f32
      %23 = arith.select %22, %20, %out_2 : i64
      linalg.yield %21, %23 : f32, i64
    } -> (tensor<3x2xf32>, tensor<3x2xi64>)
    %expanded = tensor.expand_shape %4#0 [[0], [1, 2]] output_shape [3, 2, 1] : tensor<3x2xf32> into tensor<3x2x1xf32>
    %5 = tensor.empty() : tensor<3x2x2xf32>
    %6 = linalg.generic {indexing_maps = [#map, #map2, #map], iterator_types = ["parallel", "parallel", "parallel"]} ins(%arg0, %expanded : tensor<3x2x2xf32>, tensor<3x2x1xf32>) outs(%5 : tensor<3x2x2xf32>) {
    ^bb0(%in: f32, %in_2: f32, %out: f32):
      %19 = arith.subf %in, %in_2 : f32
      linalg.yield %19 : f32
    } -> tensor<3x2x2xf32>
    %7 = linalg.generic {indexing_maps = [#map, #map], iterator_types = ["parallel", "parallel", "parallel"]} ins(%6 : tensor<3x2x2xf32>) outs(%5 : tensor<3x2x2xf32>) {
    ^bb0(%in: f32, %out: f32):
      %19 = math.exp %in : f32
      linalg.yield %19 : f32
    } -> tensor<3x2x2xf32>
    %8 = tensor.empty() : tensor<3x2x1xf32>
    %9 = linalg.fill ins(%cst_0 : f32) outs(%8 : tensor<3x2x1xf32>) -> tensor<3x2x1xf32>
    %10 = linalg.generic {indexing_maps = [#map, #map2], iterator_types = ["parallel", "parallel", "reduction"]} ins(%7 : tensor<3x2x2xf32>) outs(%9 : tensor<3x2x1xf32>) {
    ^bb0(%in: f32, %out: f32):
      %19 = arith.addf %in, %out : f32
      linalg.yield %19 : f32
    } -> tensor<3x2x1xf32>
    %11 = linalg.generic {indexing_maps = [#map, #map2, #map], iterator_types = ["parallel", "parallel", "parallel"]} ins(%7, %10 : tensor<3x2x2xf32>, tensor<3x2x1xf32>) outs(%5 : tensor<3x2x2xf32>) {
    ^bb0(%in: f32, %in_2: f32, %out: f32):
      %19 = arith.divf %in, %in_2 : f32
      linalg.yield %19 : f32
    } -> tensor<3x2x2xf32>
    %12 = linalg.generic {indexing_maps = [#map, #map], iterator_types = ["parallel", "parallel", "parallel"]} ins(%11 : tensor<3x2x2xf32>) outs(%5 : tensor<3x2x2xf32>) {
    ^bb0(%in: f32, %out: f32):
      %19 = arith.truncf %cst_1 : f64 to f32
      %20 = arith.addf %in, %19 : f32
      linalg.yield %20 : f32
    } -> tensor<3x2x2xf32>
    %13 = tensor.empty() : tensor<3x1x2xf32>
    %14 = linalg.fill ins(%cst_0 : f32) outs(%13 : tensor<3x1x2xf32>) -> tensor<3x1x2xf32>
    %15 = linalg.generic {indexing_maps = [#map, #map3], iterator_types = ["parallel", "reduction", "parallel"]} ins(%12 : tensor<3x2x2xf32>) outs(%14 : tensor<3x1x2xf32>) {
    ^bb0(%in: f32, %out: f32):
      %19 = arith.addf %in, %out : f32
      linalg.yield %19 : f32
    } -> tensor<3x1x2xf32>
    %16 = linalg.generic {indexing_maps = [#map, #map3, #map], iterator_types = ["parallel", "parallel", "parallel"]} ins(%12, %15 : tensor<3x2x2xf32>, tensor<3x1x2xf32>) outs(%5 : tensor<3x2x2xf32>) {
    ^bb0(%in: f32, %in_2: f32, %out: f32):
      %19 = arith.divf %in, %in_2 : f32
      linalg.yield %19 : f32
    } -> tensor<3x2x2xf32>
    %17 = linalg.generic {indexing_maps = [#map, #map2], iterator_types = ["parallel", "parallel", "reduction"]} ins(%16 : tensor<3x2x2xf32>) outs(%9 : tensor<3x2x1xf32>) {
    ^bb0(%in: f32, %out: f32):
      %19 = arith.addf %in, %out : f32
      linalg.yield %19 : f32
    } -> tensor<3x2x1xf32>
    %18 = linalg.generic {indexing_maps = [#map, #map2, #map], iterator_types = ["parallel", "parallel", "parallel"]} ins(%16, %17 : tensor<3x2x2xf32>, tensor<3x2x1xf32>) outs(%5 : tensor<3x2x2xf32>) {
    ^bb0(%in: f32, %in_2: f32, %out: f32):
      %19 = arith.divf %in, %in_2 : f32
      linalg.yield %19 : f32
    } -> tensor<3x2x2xf32>
    return %18 : tensor<3x2x2xf32>
  }
}
""",  # noqa: E501
    )


def test_the_linalg_of_a_site() -> None:
    text = str(mlir.to_mlir(graph_of(Site()), torch.randn(5, 2, 3), weights="external"))
    assert_expected_inline(
        steps(text),
        """\
tensor.collapse_shape -> tensor<5x6xf32>
linalg.transpose -> tensor<6x8xf32>
linalg.fill -> tensor<5x8xf32>
linalg.matmul -> tensor<5x8xf32>
linalg.generic mulf -> tensor<5x6xf32>
linalg.fill -> tensor<5x1xf32>
linalg.generic addf -> tensor<5x1xf32>
linalg.generic divf -> tensor<5x1xf32>
linalg.generic truncf addf -> tensor<5x1xf32>
linalg.generic sqrt -> tensor<5x1xf32>
tensor.extract_slice -> tensor<5x8xf32>
tensor.extract_slice -> tensor<5x1xf32>
linalg.generic divf -> tensor<5x8xf32>
tensor.extract_slice -> tensor<5x2xf32>
linalg.generic mulf -> tensor<5x2xf32>
tensor.extract_slice -> tensor<2xf32>
linalg.generic addf -> tensor<5x2xf32>
linalg.generic negf exp addf divf -> tensor<5x2xf32>
linalg.generic addf -> tensor<5x2xf32>
tensor.extract_slice -> tensor<5x2xf32>
linalg.generic mulf -> tensor<5x2xf32>
tensor.extract_slice -> tensor<2xf32>
linalg.generic addf -> tensor<5x2xf32>
linalg.generic negf exp addf divf -> tensor<5x2xf32>
linalg.generic mulf -> tensor<5x2xf32>
linalg.generic addf -> tensor<5x2xf32>
tensor.extract_slice -> tensor<5x4xf32>
linalg.generic mulf -> tensor<5x4xf32>
tensor.extract_slice -> tensor<4xf32>
linalg.generic addf -> tensor<5x4xf32>
tensor.expand_shape -> tensor<5x2x2xf32>
linalg.fill -> tensor<5x2xi64>
linalg.fill -> tensor<5x2xf32>
linalg.generic index_cast maximumf cmpf select -> (tensor<5x2xf32>, tensor<5x2xi64>)
tensor.expand_shape -> tensor<5x2x1xf32>
linalg.generic subf -> tensor<5x2x2xf32>
linalg.generic exp -> tensor<5x2x2xf32>
linalg.fill -> tensor<5x2x1xf32>
linalg.generic addf -> tensor<5x2x1xf32>
linalg.generic divf -> tensor<5x2x2xf32>
linalg.generic truncf addf -> tensor<5x2x2xf32>
linalg.fill -> tensor<5x1x2xf32>
linalg.generic addf -> tensor<5x1x2xf32>
linalg.generic divf -> tensor<5x2x2xf32>
linalg.generic addf -> tensor<5x2x1xf32>
linalg.generic divf -> tensor<5x2x2xf32>
tensor.expand_shape -> tensor<5x2x1xf32>
linalg.generic mulf -> tensor<5x2x3xf32>
linalg.fill -> tensor<5x3xf32>
linalg.generic addf -> tensor<5x3xf32>
linalg.generic tanh -> tensor<5x3xf32>
tensor.extract_slice -> tensor<5x2x1xf32>
tensor.extract_slice -> tensor<5x1x3xf32>
linalg.generic mulf -> tensor<5x2x3xf32>
tensor.extract_slice -> tensor<5x2x1xf32>
tensor.extract_slice -> tensor<5x1x3xf32>
linalg.generic mulf -> tensor<5x2x3xf32>
linalg.generic addf -> tensor<5x2x3xf32>
tensor.expand_shape -> tensor<5x2x1xf32>
tensor.expand_shape -> tensor<5x1x3xf32>
linalg.generic mulf -> tensor<5x2x3xf32>
linalg.generic addf -> tensor<5x2x3xf32>""",
    )


def test_weights_and_dialects() -> None:
    graph = mhc_compile.standalone(tiny(layers=1).eval(), ids(), sinkhorn_iters=2)
    for output_type in mlir.OUTPUT_TYPES:
        module = mlir.to_mlir(graph, ids(), output_type=output_type, weights="external")
        assert "mhc." not in str(module)
        assert len(module.arguments) == len(module.weights) + 1
    inline = mlir.to_mlir(graph, ids())
    assert not inline.weights
    assert "@main(%arg0: tensor<2x5xi64>) -> tensor<2x5x19xf32>" in str(inline)


def test_no_semantic_op_is_left_and_equal_ones_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    trace_body = mlir._trace_body
    monkeypatch.setattr(mlir, "_trace_body", lambda *a: traced.append(a[0]) or trace_body(*a))
    graph = mhc_compile.standalone(tiny(layers=3).eval(), ids())
    gm, _ = mlir.trace(graph, [ids()], {})
    assert not [n for n in gm.graph.nodes if "mhc" in str(n.target) and n.op == "call_function"]
    assert len(traced) == 5  # expand, coefficients, pre, post, collapse


class Scaled(nn.Module):
    """Two equal calls but for their scales: one tensor twice, and two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = ops.CoefficientSpec(streams=2, layout="pre,post", res="none", sinkhorn=None)
        self.phi, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4))
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        attributes = self.spec.op_arguments()
        one = ops.coefficients(x, self.phi, self.bias, self.b, self.b, None, **attributes)
        two = ops.coefficients(x, self.phi, self.bias, self.a, self.b, None, **attributes)
        return one[0], one[1], two[0], two[1]


def test_equal_calls_with_one_argument_twice_are_not_equal() -> None:
    graph, x = graph_of(Scaled()), torch.randn(3, 2, 3)
    with torch.no_grad():
        assert difference(mlir.run_mlir(graph, x, engine="wheel"), graph(x)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "deepseek_v4"])
def test_lowering_takes_less_than_two_seconds(kind: str) -> None:
    """Of one processor that nobody else uses: the least of three."""
    transformers = pytest.importorskip("transformers")
    if kind == "llama":
        model, example = llama(transformers, layers=4)
    else:
        from tests.spellings.families import deepseek_v4 as build

        model, example = build(4).eval(), tokens(6)
    graph = mhc_compile.standalone(model, example)
    mlir.to_mlir(graph, example)  # imports
    times = []
    for _ in range(3):
        start = time.process_time()
        mlir.to_mlir(graph, example)
        times.append(time.process_time() - start)
    assert min(times) < 2.0


# ------------------------------------------------------------------------------------------------ both engines
def text_config(transformers: Any, kind: str, **settings: Any) -> nn.Module:
    config = transformers.AutoConfig.for_model(kind, vocab_size=61, use_cache=False, **settings)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def tokens(length: int = 8) -> Tensor:
    return torch.randint(3, 61, (1, length), generator=torch.Generator().manual_seed(3))


def llama(transformers: Any, layers: int = 1) -> tuple[nn.Module, Tensor]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    return text_config(transformers, "llama", num_hidden_layers=layers, **sizes), tokens()


def gpt2(transformers: Any) -> tuple[nn.Module, Tensor]:
    return text_config(transformers, "gpt2", n_embd=32, n_layer=1, n_head=2, n_positions=32), tokens()


def vit(transformers: Any) -> tuple[nn.Module, Tensor]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model("vit", image_size=8, patch_size=4, **sizes)
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(config).eval(), torch.randn(1, 3, 8, 8)


def deepseek_v4(_: Any) -> tuple[nn.Module, Tensor]:
    from tests.spellings.families import deepseek_v4 as build

    return build(1).eval(), tokens(6)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["wheel", "iree"])
@pytest.mark.parametrize("build", [llama, gpt2, vit, deepseek_v4])
def test_models_equal_the_eager_graph(build: Callable[[Any], tuple[nn.Module, Tensor]], engine: str) -> None:
    transformers = pytest.importorskip("transformers")
    if engine == "iree":
        needs_iree()
    model, example = build(transformers)
    graph = mhc_compile.standalone(model, example, init="paper")
    assert any("mhc.coefficients" in str(node.target) for node in graph.graph.nodes)
    with torch.no_grad():
        assert difference(mlir.run_mlir(graph, example, engine=engine), graph(example)) <= TOLERANCE


@pytest.mark.parametrize("engine", ["wheel", "iree"])
def test_a_dynamic_length_and_live_weights(engine: str) -> None:
    if engine == "iree":
        needs_iree()
    graph = mhc_compile.standalone(tiny(layers=1).eval(), ids(), dynamic={0: 1}, init="paper", sinkhorn_iters=2)
    compiled = mlir.compile_mlir(graph, ids(), engine=engine)
    with torch.no_grad():
        for length in (5, 3, 11):
            assert difference(compiled(ids(2, length)), graph(ids(2, length))) <= TOLERANCE
        before = compiled(ids())[0]
        for parameter in graph.parameters():
            parameter.mul_(1.25)
        after = compiled(ids())
        assert difference(after, graph(ids())) <= TOLERANCE
        assert not torch.equal(before, after[0])


# ------------------------------------------------------------------------------------------------ the backend
@pytest.fixture
def iree_backend() -> dict[str, Any]:
    needs_iree()
    return {"lowering": "mlir", "sinkhorn_iters": 2}


def test_the_backend_runs_inference_and_refuses_to_train(iree_backend: dict[str, Any]) -> None:
    model = tiny(layers=1).eval()
    want = model(ids())
    compiled = torch.compile(model, backend="mhc", options=iree_backend)
    with pytest.raises(OptionError, match="is for inference"):
        compiled(ids())
    with torch.no_grad():
        assert difference((compiled(ids()),), (want,)) <= TOLERANCE
    assert reports[-1].log.counts()["coefficients", "mlir"] == 2


@pytest.mark.slow
def test_the_backend_follows_the_length(iree_backend: dict[str, Any]) -> None:
    model = tiny().eval()
    wants = [model(ids(2, length)) for length in (5, 7, 9)]
    compiled = torch.compile(model, backend="mhc", options=iree_backend)
    with torch.inference_mode():
        for want in wants:
            assert difference((compiled(ids(2, want.shape[1])),), (want,)) <= TOLERANCE


# ------------------------------------------------------------------------------------------------ what is refused
def test_a_model_is_converted_first() -> None:
    model = tiny(layers=1).eval()
    torch.manual_seed(5)
    lowered = mlir.to_mlir(model, ids(), dynamic={0: 1}, streams=2, sinkhorn_iters=1)
    torch.manual_seed(5)
    graph = mhc_compile.standalone(model, ids(), dynamic={0: 1}, streams=2, sinkhorn_iters=1)
    assert str(lowered) == str(mlir.to_mlir(graph, ids()))
    assert "mhc" not in str(lowered)
    assert lowered.arguments[0].shape[1] is None
    assert "mhc0" not in dict(model.named_modules())


def test_a_model_runs() -> None:
    model = tiny(layers=1).eval()  # the start preserves the function, so that the model itself says what is right
    with torch.no_grad():
        have = mlir.run_mlir(model, ids(), engine="wheel", streams=2, sinkhorn_iters=1)
        assert difference(have, (model(ids()),)) <= TOLERANCE


def test_options_are_for_models() -> None:
    with pytest.raises(OptionError, match="streams: options say how a model is converted"):
        mlir.to_mlir(graph_of(Sinkhorn()), torch.randn(2, 2), streams=4)
    with pytest.raises(OptionError, match="not of a function"):
        mlir.to_mlir(lambda x: x, torch.randn(2, 2))  # type: ignore[arg-type]  # the mistake that is tested


def test_illegal_arguments() -> None:
    graph = graph_of(Sinkhorn())
    with pytest.raises(OptionError, match="output_type='llvm'"):
        mlir.to_mlir(graph, torch.randn(2, 2), output_type="llvm")
    with pytest.raises(OptionError, match="weights='none'"):
        mlir.to_mlir(graph, torch.randn(2, 2), weights="none")
    with pytest.raises(OptionError, match="takes 1 tensors and got 2"):
        mlir.to_mlir(graph, torch.randn(2, 2), torch.randn(2, 2))


def test_an_axis_that_the_graph_fixes() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(5)

    with pytest.raises(OptionError, match="the graph fixes it to 5"):
        mlir.to_mlir(graph_of(Fixed()), torch.randn(5), dynamic={0: 0})


def test_torch_mlir_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("torch_mlir"):
            raise ImportError("No module named 'torch_mlir'")
        return real(name, *args, **kwargs)

    mlir.torch_mlir.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mhc-compile\[mlir\]'"):
        mlir.to_mlir(graph_of(Sinkhorn()), torch.randn(2, 2))
