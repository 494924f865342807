"""Question answering: SQuAD's files and metrics, windows over long passages, answers as spans."""

import json

import pytest
import torch

from fused_ops.train import squad
from fused_ops.train.loop import Trainer
from fused_ops.train.qa import QuestionAnswering, QuestionAnsweringConfig, Questions
from tests.train.material import squad_content, tiny, write_squad
from tests.train.runs import CPU, train


@pytest.mark.parametrize(
    "answer, truths, exact, f1",
    (
        ("The Norman's,  Duke", ["a normans duke"], 1, 1),
        ("in 1066", ["1066", "the year 1066"], 0, 2 / 3),
        ("cat cat dog", ["cat dog dog"], 0, 2 / 3),
        ("bird", ["cat", "dog"], 0, 0),
        ("U.S.", ["US"], 1, 1),
        ("", [], 1, 1),
        ("the", [], 1, 1),
        ("something", [], 0, 0),
        ("", ["something"], 0, 0),
        ("cat", ["the", "cat"], 1, 1),
    ),
)
def test_metrics_are_those_of_the_official_script(answer, truths, exact, f1):
    assert squad.exact_match(answer, truths) == exact
    assert squad.f1(answer, truths) == pytest.approx(f1)


def test_a_file_is_read_by_paragraph(tmp_path):
    found = squad.read(write_squad(tmp_path / "squad.json", unanswerable=True), "train_file")
    assert [len(questions) for questions in found] == [5] * len(found) and len(found) > 15
    answered, unanswerable = found[1][0], found[1][-1]
    ((text, start),) = answered.answers
    assert answered.context[start : start + len(text)] == text and unanswerable.answers == ()


def broken(change) -> str:
    content = squad_content()
    change(content)
    return json.dumps(content)


WHOLE = json.dumps(squad_content())
BROKEN = {
    "truncated": (WHOLE[: len(WHOLE) // 2], r"line 1 column \d+"),
    "empty": ("", "Expecting value"),
    "a list": ("[]", "TypeError"),
    "without data": ("{}", "KeyError 'data'"),
    "without a question": ('{"data": []}', "without a question"),
    "answers lost": (broken(lambda content: content["data"][0]["paragraphs"][0]["qas"][0].pop("answers")), "'answers'"),
    "answer elsewhere": (
        broken(lambda content: content["data"][0]["paragraphs"][0]["qas"][0]["answers"][0].update(answer_start=7)),
        "is not at 7 of its context",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_not_whole_is_refused(kind, tmp_path):
    content, reason = BROKEN[kind]
    file = tmp_path / "squad.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"dev must be a SQuAD file .*, got {file}.*({reason})"):
        squad.read(file, "dev")


def test_a_file_or_folder_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train_file must be a SQuAD file.*No such file"):
        tiny("qa", tmp_path, train_file=tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"model_path must be a BERT's folder, got None"):
        QuestionAnsweringConfig(train_file=tmp_path / "squad.json")
    with pytest.raises(ValueError, match=r"model_path must be a tokenizer.json or a folder with one, got"):
        tiny("qa", tmp_path, model_path=tmp_path)


@pytest.mark.parametrize(
    "options, message",
    (
        ({"doc_stride": 48}, "doc_stride must be well below max_seq_length, 48, got 48"),
        ({"max_seq_length": 600}, "max_seq_length must be at most the model's 512 positions, got 600"),
    ),
)
def test_windows_that_do_not_fit_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny("qa", tmp_path, **options).model()


def test_windows_cover_a_long_passage_and_find_the_answer(tmp_path):
    recipe = tiny("qa", tmp_path, max_seq_length=32, doc_stride=6)
    seen = 0
    for question in recipe.train.questions:
        windows = recipe.train.windows(question)
        ((text, _),) = question.answers
        covered = set()
        for before, window in zip([None, *windows], windows):
            assert len(window.ids) <= 32
            places = range(window.first, window.last + 1)
            covered |= {character for i in places for character in range(*window.offsets[i])}
            if before is not None:
                shared = before.offsets[before.last - 5 : before.last + 1]
                assert window.offsets[window.first : window.first + 6] == shared
            first, last = window.span()
            if (first, last) != (0, 0):
                seen += 1
                assert question.context[window.offsets[first][0] : window.offsets[last][1]] == text
        assert all(question.context[i].isspace() for i in set(range(len(question.context))) - covered)
    assert seen >= 40  # most answers are shorter than a window


def test_a_tokenizer_that_joins_question_and_passage_is_refused(tmp_path):
    tiny("qa", tmp_path)
    tokenizer = json.loads((tmp_path / "bert/tokenizer.json").read_text())
    (tmp_path / "bert/tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    with pytest.raises(ValueError, match=r"model_path must be .* tokenizer sets question and passage apart"):
        tiny("qa", tmp_path)


def test_a_question_that_is_too_long_is_cut(tmp_path):
    recipe = tiny("qa", tmp_path, max_query_length=5)
    question = squad.Question("1", "why? " * 200, "abs: Return the absolute value.", (("the absolute value", 12),))
    (window,) = recipe.train.windows(question)
    assert window.first <= 7 and window.span() != (0, 0)


def test_the_answer_is_the_best_span_of_all_windows(tmp_path):
    recipe = tiny("qa", tmp_path, max_seq_length=32, doc_stride=6, max_answer_length=3)
    windows = next(w for w in map(recipe.train.windows, recipe.train.questions) if len(w) > 1)
    logits = [torch.zeros(2, len(window.ids)) for window in windows]
    window, place = windows[1], windows[1].first + 2
    logits[0][:, 1] = 50.0  # the question's tokens are no answer
    logits[1][0, place], logits[1][1, place + 2] = 5.0, 5.0
    logits[1][1, place - 1], logits[1][1, place + 3] = 9.0, 9.0  # ends before it starts; is too long
    wanted = window.question.context[window.offsets[place][0] : window.offsets[place + 2][1]]
    assert recipe.answer(windows, logits) == wanted
    for pair in logits:
        pair[:, 0] = 20.0
    assert recipe.answer(windows, logits) == wanted  # every question of the training file has an answer
    recipe.may_be_unanswerable = True
    assert recipe.answer(windows, logits) == ""
    logits[1][:, 0] = 4.9  # one window that sees an answer is enough
    assert recipe.answer(windows, logits) == wanted


def test_padding_does_not_change_the_loss(tmp_path):
    recipe = tiny("qa", tmp_path, dropout=0.0)
    model = recipe.model()
    windows = [recipe.train.windows(question)[0] for question in recipe.train.questions[:9]]
    alone = torch.stack([recipe.loss(model, recipe.collate([window])) for window in windows])
    torch.testing.assert_close(recipe.loss(model, recipe.collate(windows)), alone.mean())


def test_validation_and_test_do_not_share_passages_with_training(tmp_path):
    recipe = tiny("qa", tmp_path)
    contexts = [{question.context for question in data.questions} for data in (recipe.train, recipe.valid, recipe.test)]
    assert all(contexts) and not any(contexts[i] & contexts[j] for i, j in ((0, 1), (0, 2), (1, 2)))
    other = write_squad(tmp_path / "dev.json", per_passage=3)
    given = tiny("qa", tmp_path, validation_file=other, test_file=other)
    assert len(given.train) == 84 and len(given.valid.questions) == len(given.test.questions) == 84


@pytest.mark.slow
@pytest.mark.parametrize("unanswerable", (False, True), ids=("squad 1.1", "squad 2.0"))
def test_minilm_learns_a_file(unanswerable, tmp_path):
    """Exact match of 90 % and more on the questions it was trained on, from real weights."""
    from bench.pretrained import minilm
    from bench.pretrained.weights import WeightsMissing, locate

    try:
        folder = locate(minilm.DISTRIBUTION, "model.safetensors").parent
    except WeightsMissing as missing:
        pytest.skip(str(missing))
    file = write_squad(tmp_path / "squad.json", unanswerable=unanswerable)
    config = QuestionAnsweringConfig(
        output_dir=tmp_path / "run",
        model_path=folder,
        train_file=file,
        epochs=20,
        batch_size=6,
        lr=1.5e-4,
        dropout=0.0,
        eval_steps=100,
    )
    recipe = QuestionAnswering(config)
    trainer = Trainer(recipe, CPU)
    untrained = trainer.evaluate(recipe.valid)
    trainer.train()
    learned = Questions(recipe.train.questions, recipe.tokenizer, config, drawn=False)
    found = trainer.evaluate(learned)
    assert untrained["exact_match"] < 20 and found["exact_match"] >= 90 and found["f1"] >= found["exact_match"]


def test_a_tiny_bert_trains(tmp_path):
    trainer = train(tiny("qa", tmp_path, max_steps=2))
    assert trainer.test(tmp_path / "run/best.pt").keys() == {"exact_match", "f1"}
