"""Classification of sequences: digits by rows, the UCR archive's layout, and what the default reaches."""

import pytest
import torch

from fused_ops.train.loop import Trainer
from fused_ops.train.sequence import SequenceClassification, SequenceConfig
from tests.train.material import tiny, write_series
from tests.train.runs import CPU, train


def test_digits_are_read_row_by_row(tmp_path):
    recipe = tiny("sequence", tmp_path, noise=0.0)
    images = tiny("image", tmp_path)
    series, length, label = recipe.test[7]
    assert series.shape == (8, 8) and length == 8 and label == images.test[7][1]
    torch.testing.assert_close(series * 0.38 + 0.3, images.test.data[7][0][0])


def test_the_archive_is_read_with_its_lengths(tmp_path):
    recipe = tiny("sequence", tmp_path, data_path=write_series(tmp_path / "Waves"), val_split=0.25, noise=0.0)
    assert [len(data) for data in (recipe.train, recipe.valid, recipe.test)] == [18, 6, 24]
    assert recipe.num_classes == 2
    series, length, label = recipe.test[3]
    assert series.shape == (10, 1) and length == 4 + 3 and label == 1
    assert (recipe.test.tensors[1] == torch.tensor([4 + i % 7 for i in range(24)])).all()
    trainer = train(
        tiny("sequence", tmp_path, data_path=tmp_path / "Waves", val_split=0.25, batch_size=6, epochs=25, lr=0.02)
    )
    assert trainer.test(tmp_path / "run/best.pt")["accuracy"] > 0.9


def test_noise_is_in_training_only(tmp_path):
    recipe = tiny("sequence", tmp_path)
    assert not torch.equal(recipe.train[0][0], recipe.train[0][0])
    assert torch.equal(recipe.valid[0][0], recipe.valid[0][0])


@pytest.mark.parametrize("kind", ("lstm", "gru", "rnn"))
def test_gates_start_orthogonal(kind, tmp_path):
    model = tiny("sequence", tmp_path, kind=kind).model()
    for gate in model.rnn.weight_hh_l1.split(12):
        torch.testing.assert_close(gate @ gate.T, torch.eye(12), rtol=0, atol=1e-5)
    assert model.rnn.bias_ih_l0.sum() == (12 if kind == "lstm" else 0) and not model.rnn.bias_hh_l0.any()


BROKEN = {
    "empty": (None, "a folder with one .*_TRAIN.tsv and one .*_TEST.tsv, got .* with neither"),
    "words": ("1\thello\n", "a folder of series, a line each, got .*could not convert"),
    "ragged": ("1\t2\t3\n1\t2\n", "a folder of series, a line each, got"),
    "nothing": ("", "a folder of series, a label and values each, got .*of shape"),
    "a gap": ("1\t0.5\t0.5\n1\tnan\t0.5\n", "without gaps, got .* with one in line 2"),
    "a new label": ("1\t0.5\t0.5\n2\t0.5\t0.5\n", r"labels of TEST, got .*: \[.*2.*\] are new"),
}


@pytest.mark.filterwarnings("ignore:loadtxt")
@pytest.mark.parametrize("kind", BROKEN)
def test_a_folder_that_is_not_an_archive_is_refused(kind, tmp_path):
    content, reason = BROKEN[kind]
    (tmp_path / "Name").mkdir()
    if content is not None:
        (tmp_path / "Name/Name_TRAIN.tsv").write_text("1\t0.5\t0.5\n")
        (tmp_path / "Name/Name_TEST.tsv").write_text(content)
    with pytest.raises(ValueError, match=f"data_path must be .*{reason}"):
        tiny("sequence", tmp_path, data_path=tmp_path / "Name")


def test_an_lstm_learns_the_digits_row_by_row(tmp_path):
    trainer = Trainer(SequenceClassification(SequenceConfig(output_dir=tmp_path)), CPU)
    trainer.train()
    assert trainer.test(tmp_path / "best.pt")["accuracy"] >= 0.97
