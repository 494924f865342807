"""Question answering: a BERT that points at the answer in a passage, fine-tuned on a file in SQuAD's format."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from fused_ops.core.errors import ArgumentError
from fused_ops.models import BERTForQuestionAnswering
from fused_ops.train import squad
from fused_ops.train.config import Config
from fused_ops.train.data import held_out, read_tokenizer
from fused_ops.train.recipe import Recipe, Sums
from fused_ops.train.squad import Question


@dataclass(frozen=True)
class QuestionAnsweringConfig(Config):
    """Fine-tune a BERT to answer questions on passages.

    Attributes:
        model_path: a Hugging Face folder with a BERT (config.json, model.safetensors) and its tokenizer.json.
        train_file: a SQuAD file, version 1.1 or 2.0.
        validation_file, test_file: more of them; default: of each, val_split of the training file's paragraphs.
        val_split: share of the training file's paragraphs, where they have to do for validation or for the test.
        max_seq_length: tokens of question and passage that the model sees at once; longer passages are cut.
        doc_stride: tokens that neighbouring pieces of a passage share.
        max_query_length: tokens of a question; what is behind them is dropped.
        max_answer_length: tokens of an answer.
        null_score_diff_threshold: by how much the score of no answer has to exceed the best answer's, if the training
            file has questions without one.
        dropout: probability, throughout the BERT.
    """

    model_path: Path | None = None
    train_file: Path | None = None
    validation_file: Path | None = None
    test_file: Path | None = None
    val_split: float = 0.1
    max_seq_length: int = 384
    doc_stride: int = 128
    max_query_length: int = 64
    max_answer_length: int = 30
    null_score_diff_threshold: float = 0.0
    dropout: float = 0.1
    epochs: int = 2
    batch_size: int = 12
    lr: float = 3e-5
    warmup_ratio: float = 0.1

    free = Config.free | {"model_path", "train_file", "validation_file", "test_file"}
    least = Config.least | dict.fromkeys(("max_seq_length", "max_query_length", "max_answer_length"), 1)
    least |= {"doc_stride": 0}
    shares = Config.shares | {"val_split", "dropout"}

    def __post_init__(self):
        super().__post_init__()
        for name, wanted in (("model_path", "a BERT's folder"), ("train_file", "a SQuAD file")):
            if getattr(self, name) is None:
                raise ArgumentError(name, wanted, None)


@dataclass(frozen=True)
class Window:
    """A question and a piece of its passage, as the model takes them. `first` to `last`: the passage's tokens;
    `offsets`: the characters of the context that each token stands for."""

    question: Question
    ids: list[int]
    types: list[int]
    offsets: list[tuple[int, int]]
    first: int
    last: int

    def span(self) -> tuple[int, int]:
        """The first and last token of the first answer; of the token before all, if it is not in this piece."""
        if not self.question.answers or self.last < self.first:
            return 0, 0
        text, start = self.question.answers[0]
        end = start + len(text)
        if start < self.offsets[self.first][0] or end > self.offsets[self.last][1]:
            return 0, 0
        passage = range(self.first, self.last + 1)
        inside = [i for i in passage if self.offsets[i][1] > start and self.offsets[i][0] < end]
        return inside[0], inside[-1]

    def best(self, starts: Tensor, ends: Tensor, longest: int) -> tuple[float, str]:
        """The largest starts[i] + ends[j], i ≤ j < i + longest, in the passage; and the text from i to j."""
        size = self.last - self.first + 1
        if size < 1:
            return -torch.inf, ""
        scores = starts[self.first : self.last + 1, None] + ends[self.first : self.last + 1]
        possible = torch.ones(size, size, dtype=torch.bool).triu().tril(longest - 1)
        score, place = scores.masked_fill(~possible, -torch.inf).flatten().max(0)
        i, j = (self.first + at for at in divmod(int(place), size))
        return float(score), self.question.context[self.offsets[i][0] : self.offsets[j][1]]


class Questions(Dataset):
    """Of each question a random window (training), or all of its windows."""

    def __init__(self, questions: list[Question], tokenizer: Tokenizer, config: QuestionAnsweringConfig, drawn: bool):
        self.questions, self.drawn = questions, drawn
        self.longest_query = config.max_query_length
        self.queries, self.pairs = (Tokenizer.from_str(tokenizer.to_str()) for _ in range(2))
        self.queries.no_padding()
        self.queries.no_truncation()
        if self.pairs.num_special_tokens_to_add(True) == 0:
            raise ArgumentError("model_path", "a folder whose tokenizer sets question and passage apart", "one without")
        self.pairs.no_padding()
        try:
            self.pairs.enable_truncation(config.max_seq_length, stride=config.doc_stride, strategy="only_second")
        except ValueError as error:
            wanted = f"well below max_seq_length, {config.max_seq_length}"
            raise ArgumentError("doc_stride", wanted, f"{config.doc_stride}: {error}") from error

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Window | list[Window]:
        found = self.windows(self.questions[index])
        return found[int(torch.randint(len(found), ()))] if self.drawn else found

    def windows(self, question: Question) -> list[Window]:
        query = question.question.strip()
        tokens = self.queries.encode(query, add_special_tokens=False)
        if len(tokens) > self.longest_query:
            query = query[: tokens.offsets[self.longest_query - 1][1]]
        whole = self.pairs.encode(query, question.context)
        found = []
        for piece in (whole, *whole.overflowing):
            passage = [place for place, part in enumerate(piece.sequence_ids) if part == 1]
            first, last = (passage[0], passage[-1]) if passage else (1, 0)
            found.append(Window(question, piece.ids, piece.type_ids, piece.offsets, first, last))
        return found


def padded(windows: list[Window]) -> list[Tensor]:
    """Tokens, mask (True on tokens) and segments, (windows, longest) each."""
    ids, types = (
        pad_sequence([torch.tensor(getattr(window, name)) for window in windows], batch_first=True)
        for name in ("ids", "types")
    )
    lengths = torch.tensor([len(window.ids) for window in windows])
    return [ids, torch.arange(ids.size(1)) < lengths[:, None], types]


class QuestionAnswering(Recipe):
    """A BERT whose loss is the cross entropy of the answer's first and last token, and whose answers are spans."""

    name = "qa"
    config_class = QuestionAnsweringConfig
    metric_for_best_model = "f1"
    reported = ("exact_match", "f1")

    def __init__(self, config: QuestionAnsweringConfig):
        super().__init__(config)
        train = squad.read(config.train_file, "train_file")
        sets = []
        for name in ("test_file", "validation_file"):
            file = getattr(config, name)
            train, other = (train, squad.read(file, name)) if file else held_out(train, config.val_split)
            sets.append(list(chain.from_iterable(other)))
        train = list(chain.from_iterable(train))
        self.may_be_unanswerable = not all(question.answers for question in train)
        self.tokenizer = read_tokenizer(config.model_path / "tokenizer.json", "model_path")
        self.train = Questions(train, self.tokenizer, config, drawn=True)
        self.test, self.valid = (Questions(questions, self.tokenizer, config, drawn=False) for questions in sets)

    def model(self) -> nn.Module:
        """The folder's weights; those that point at the answer are new, if it has none."""
        p = self.config.dropout
        drops = {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}
        model = BERTForQuestionAnswering.from_pretrained(self.config.model_path, fresh=("qa_outputs.*",), **drops)
        if self.config.max_seq_length > (most := model.config.max_position_embeddings):
            raise ArgumentError("max_seq_length", f"at most the model's {most} positions", self.config.max_seq_length)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder)
        self.tokenizer.save(str(folder / "tokenizer.json"))

    @staticmethod
    def collate(windows: list[Window]) -> list[Tensor]:
        return [*padded(windows), torch.tensor([window.span() for window in windows])]

    @staticmethod
    def collate_measured(questions: list[list[Window]]) -> list:
        return [*padded(list(chain.from_iterable(questions))), questions]

    def loss(self, model: nn.Module, batch: list) -> Tensor:
        ids, mask, types, spans = batch
        logits = torch.stack(model(ids, mask, types), 1).masked_fill(~mask[:, None], -torch.inf)
        return F.cross_entropy(logits.flatten(0, 1), spans.flatten())

    def measure(self, model: nn.Module, batch: list) -> Sums:
        ids, mask, types, questions = batch
        logits = iter(torch.stack(model(ids, mask, types), 1).float().cpu())
        exact, f1 = 0.0, 0.0
        for windows in questions:
            truths = [text for text, _ in windows[0].question.answers]
            answer = self.answer(windows, [next(logits) for _ in windows])
            exact, f1 = exact + squad.exact_match(answer, truths), f1 + squad.f1(answer, truths)
        return {"exact_match": (exact, len(questions)), "f1": (f1, len(questions))}

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        return {name: 100 * mean for name, mean in means.items()}  # as SQuAD's script has it

    def answer(self, windows: list[Window], logits: list[Tensor]) -> str:
        """The best span of all windows; "" if no answer, which is the first token's score, is the better one.

        Args:
            logits: of each window, (2, length), of starts and ends.
        """
        found = [window.best(*pair, self.config.max_answer_length) for window, pair in zip(windows, logits)]
        score, text = max(found)
        none = min(float(pair[:, 0].sum()) for pair in logits)
        return "" if self.may_be_unanswerable and none - score > self.config.null_score_diff_threshold else text
