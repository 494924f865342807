"""fuse() on models that nobody here wrote: the same numbers, and everything else as it was."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard

import fused_ops
from fused_ops.core.dispatch import record
from tests.support import randn
from tests.third_party import timm, torchvision, transformers

IMAGE = (2, 3, 32, 32)
# name: how it is built, how many chains with a batch norm a call runs, why what is left alone is
CONVOLUTIONAL = {
    "resnet50": (lambda: torchvision.models.resnet50(), 53, ()),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(), 52, ()),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(), 34, ()),
    "efficientnet_b0": (lambda: torchvision.models.efficientnet_b0(), 49, ()),
    "convnext_tiny": (lambda: torchvision.models.convnext_tiny(), 0, ()),
    "vgg11_bn": (lambda: torchvision.models.vgg11_bn(), 8, ()),
    "densenet121": (lambda: torchvision.models.densenet121(), 1, ("its forward asks for the type of a value",)),
    "regnet_y_400mf": (lambda: torchvision.models.regnet_y_400mf(), 53, ()),
    "googlenet": (lambda: torchvision.models.googlenet(init_weights=False, aux_logits=False), 57, ()),
    "vit": (lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 48), 0, ()),
    "timm resnet26d": (lambda: timm.create_model("resnet26d"), 31, ()),
    "timm seresnet18": (lambda: timm.create_model("seresnet18"), 20, ()),
    "timm efficientnet_lite0": (lambda: timm.create_model("efficientnet_lite0"), 49, ()),
    "timm regnety_002": (lambda: timm.create_model("regnety_002"), 44, ()),
    "timm vit": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1), 0, ()),
}


def built(make):
    """In evaluation, with statistics and affine parts that are not the identity."""
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * randn(module.num_features, seed=1))
            module.running_var.copy_(0.5 + randn(module.num_features, seed=2).square())
    return model.eval()


def resnet():
    kind, block = timm.models.resnet.ResNet, timm.models.resnet.BasicBlock
    return built(lambda: kind(block, (1, 1, 1, 1), 10, channels=(8, 8, 16, 16)))


def mobilenet():
    rows = ((16, 3, 32, 16, True, "RE", 2), (16, 5, 48, 24, False, "HS", 2), (24, 3, 48, 24, True, "HS", 1))
    settings = [torchvision.models.mobilenetv3.InvertedResidualConfig(*row, 1, 1.0) for row in rows]
    return built(lambda: torchvision.models.MobileNetV3(settings, 32, 10))


def both(make):
    plain = make()
    fused = copy.deepcopy(plain)
    fused_ops.fuse(fused)
    return plain, fused


def agree(found, wanted, tolerance=1e-4):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutional(name):
    make, chains, reasons = CONVOLUTIONAL[name]
    plain, untouched = built(make), vars(nn.Module).copy()
    fused, x = copy.deepcopy(plain), randn(*IMAGE)
    report = fused_ops.fuse(fused)
    assert {row.reason for row in report if row.new is None} == {*reasons}
    assert vars(nn.Module) == untouched
    with torch.inference_mode(), record() as choices:
        found = fused(x)
    with torch.inference_mode():
        agree(found, plain(x))
    assert [choice.op for choice in choices].count("conv_bn_act2d") == chains


def tiny(kind, config, **inputs):
    def make():
        torch.manual_seed(0)
        return getattr(transformers, kind)(getattr(transformers, config)(**SIZES[config])).eval()

    return make, inputs


SIZES = {
    "BertConfig": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50),
    "GPT2Config": dict(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=40),
    "ViTConfig": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32),
    "Wav2Vec2Config": dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=20,
        conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, apply_spec_augment=False,
    ),
    "WhisperConfig": dict(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20, max_target_positions=20,
        vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
}  # fmt: skip
IDS = torch.arange(24).view(2, 12)
LANGUAGE = {
    "bert": tiny("BertModel", "BertConfig", input_ids=IDS),
    "gpt2": tiny("GPT2LMHeadModel", "GPT2Config", input_ids=IDS),
    "vit": tiny("ViTModel", "ViTConfig", pixel_values=randn(2, 3, 32, 32)),
    "wav2vec2": tiny("Wav2Vec2ForCTC", "Wav2Vec2Config", input_values=randn(2, 400)),
    "whisper": tiny(
        "WhisperForConditionalGeneration", "WhisperConfig", input_features=randn(2, 8, 40), decoder_input_ids=IDS
    ),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_transformers(name):
    make, inputs = LANGUAGE[name]
    plain, fused = both(make)
    with torch.inference_mode():
        agree(fused(**inputs)[0], plain(**inputs)[0])
    fused.train(), plain.train()
    for model in (fused, plain):
        torch.manual_seed(3)
        model(**inputs)[0].square().mean().backward()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


class Speech(nn.Module):
    """A convolution stack before an LSTM, as speech models have."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()
        )
        self.rnn = nn.LSTM(8 * 10, 16, 2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(32, 5)

    def forward(self, x):
        x = self.front(x.unsqueeze(1))
        return self.out(self.rnn(x.transpose(1, 2).flatten(2))[0])


@pytest.mark.parametrize(
    "make, inputs",
    (
        (Speech, (randn(2, 24, 40),)),
        (lambda: nn.Transformer(16, 2, 1, 1, 24, 0.0, batch_first=True), (randn(2, 5, 16), randn(2, 4, 16))),
        (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 5, 3)), (randn(2, 3, 9),)),
    ),
)
def test_plain_torch(make, inputs):
    torch.manual_seed(0)
    plain, fused = both(lambda: make().eval())
    with torch.inference_mode():
        agree(fused(*inputs), plain(*inputs))
    fused(*inputs).square().sum().backward(), plain(*inputs).square().sum().backward()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


two = pytest.mark.parametrize("make", (resnet, mobilenet))


@two
def test_training_and_optimizer_state(make):
    plain, fused = both(make)
    x, target = randn(*IMAGE), torch.tensor([1, 2])
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (plain, fused)]
    for model, optimizer in zip((plain, fused), optimizers):
        for _ in range(2):
            torch.manual_seed(1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(x), target).backward()
            optimizer.step()
    for (name, ours), theirs in zip(fused.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=5e-3, msg=name)
    optimizers[0].load_state_dict(optimizers[1].state_dict())
    with torch.no_grad():
        again = copy.deepcopy(plain)
        again.load_state_dict(fused.state_dict(), strict=True)
        agree(fused.eval()(x), again.eval()(x))


WRITES = {
    "data": lambda m: [param.data.mul_(1.1) for param in m.parameters()],
    "numpy": lambda m: [param.detach().numpy().__imul__(1.1) for param in m.parameters()],
    "copy_": lambda m: [param.copy_(param * 1.1) for param in m.parameters()],
    "statistics": lambda m: m.train()(randn(4, 3, 32, 32)) is m.eval(),
    "a state dict": lambda m: m.load_state_dict({name: value + 1 for name, value in m.state_dict().items()}),
    "a fused optimizer": lambda m: stepped(m.train(), torch.optim.AdamW(m.parameters(), 0.01, fused=True)).eval(),
    "half weights": lambda m: m.bfloat16().float(),
}


@torch.enable_grad()
def stepped(model, optimizer):
    model(randn(4, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    return model


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=("nchw", "channels_last"))
@pytest.mark.parametrize("write", WRITES)
@two
def test_evaluation_follows_every_write(make, write, layout):
    plain, fused = (model.to(memory_format=layout) for model in both(make))
    x = randn(*IMAGE).contiguous(memory_format=layout)
    with torch.no_grad():
        before = fused(x)
        WRITES[write](fused)
        plain.load_state_dict(fused.state_dict())
        value = fused(x)
        agree(value, plain(x))
    assert (value - before).norm() > 1e-3 * before.norm()


@two
def test_checkpoints_copies_and_pickles(make):
    plain, fused = both(make)
    x, buffer = randn(*IMAGE), io.BytesIO()
    torch.save(fused.state_dict(), buffer)
    buffer.seek(0)
    plain.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    fused.load_state_dict(plain.state_dict(), strict=True)
    buffer = io.BytesIO()
    assert list(fused.state_dict()) == list(plain.state_dict())
    torch.save(fused, buffer)
    buffer.seek(0)
    with torch.inference_mode():
        value = fused(x)
        for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(buffer, weights_only=False)):
            assert torch.equal(twin(x), value)
            assert [type(module) for module in twin.modules()] == [type(module) for module in fused.modules()]


@two
def test_hooks_before_and_after(make):
    plain = make()
    seen = []
    first, *_, last = [module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)]
    first.register_forward_hook(lambda *_: seen.append("before"))
    fused = plain
    fused_ops.fuse(fused)
    last.register_forward_hook(lambda *_: seen.append("after"))
    fused.register_forward_pre_hook(lambda *_: seen.append("model"))
    with torch.inference_mode():
        fused(randn(*IMAGE))
    assert sorted(seen) == ["after", "before", "model"]


@two
def test_sync_batch_norm_and_a_replaced_child(make):
    plain, fused = both(make)
    x = randn(*IMAGE)
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in fused.modules())
    with torch.inference_mode():
        agree(fused(x), plain(x))
    plain, fused = both(make)
    for model in (plain, fused):
        norms = [(name, module) for name, module in model.named_modules() if type(module) is nn.BatchNorm2d]
        for name, _ in norms[:2]:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
    with torch.inference_mode():
        agree(fused(x), plain(x))


@two
def test_modes_types_and_layouts(make):
    plain, fused = both(make)
    x = randn(*IMAGE)
    with torch.inference_mode():
        fused.train().eval()
        agree(fused(x), plain(x))
        fused, plain = fused.to(memory_format=torch.channels_last), plain.to(memory_format=torch.channels_last)
        last = x.contiguous(memory_format=torch.channels_last)
        agree(fused(last), plain(last))
        exact = copy.deepcopy(plain).double()
        agree(fused.double()(x.double()), exact(x.double()), 1e-9)
        agree(fused.bfloat16()(x.bfloat16()).double(), exact(x.double()), 0.1)


@two
def test_unfuse_restores_it_exactly(make):
    plain, fused = both(make)
    with torch.inference_mode():
        fused(randn(*IMAGE))
        fused_ops.unfuse(fused)
        assert torch.equal(fused(randn(*IMAGE)), plain(randn(*IMAGE)))
    for ours, theirs in zip(fused.modules(), plain.modules(), strict=True):
        assert type(ours) is type(theirs) and vars(ours).keys() == vars(theirs).keys()
    for ours, theirs in zip(fused.state_dict().items(), plain.state_dict().items(), strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@two
def test_ddp(make, process_group):
    plain, fused = both(make)
    x = randn(*IMAGE)
    wrapped = nn.parallel.DistributedDataParallel(fused)
    for model in (wrapped, plain):
        torch.manual_seed(1)
        model.train()(x).square().mean().backward()
    worst = max(
        ((ours.grad - theirs.grad).norm() / (theirs.grad.norm() + 1e-6)).item()
        for ours, theirs in zip(wrapped.parameters(), plain.parameters(), strict=True)
    )
    assert worst < 1e-2
    with torch.inference_mode():
        agree(wrapped.eval()(x), plain.eval()(x))


@two
def test_fsdp_after_fuse_and_before(make, process_group):
    plain, fused = both(make)
    x = randn(*IMAGE)
    for part in reversed([part for part in fused.modules() if part is fused or isinstance(part, nn.Sequential)]):
        fully_shard(part)
    with torch.no_grad():
        agree(fused(x), plain(x))
    assert list(get_model_state_dict(fused)) == list(plain.state_dict())
    for model in (fused, plain):
        torch.manual_seed(1)
        model.train()(x).square().mean().backward()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-3, atol=1e-4)
    fused.eval(), plain.eval()
    with torch.no_grad():
        agree(fused(x), plain(x))
        agree(fused_ops.unfuse(fused)(x), plain(x))
    assert isinstance(fused, FSDPModule) and fused.__class__.__bases__[1] is type(plain)
    sharded = copy.deepcopy(plain)
    fully_shard(sharded)
    report = fused_ops.fuse(sharded)
    assert report and all(row.new is None and "fully_shard" in row.reason for row in report)
    with torch.no_grad():
        agree(sharded(x), plain(x))
