"""A teacher with another tokenizer, from rows to the loss, compared with float64 references."""

import pytest
import torch
from losses.segment_oracle import segment_by_segment
from small import TEXT, save_small, small_rows, small_tokenizer
from transformers import AutoModelForCausalLM

from kd.data.alignment import AlignedCollator, AlignedEncoder
from kd.data.encoding import EncodedRow, Encoder
from kd.data.packing import Collator, FilledUp, pack
from kd.data.vocabularies import shared_vocabulary
from kd.models.heads import LossInputs, return_loss
from kd.settings.distillation import ModelSettings, Objective
from kd.settings.teacher import TeacherSettings
from kd.teachers.aligned_teacher import AlignedTeacher, check_alignment
from kd.teachers.live import LiveTeacher

CPU = torch.device("cpu")
OBJECTIVE = Objective(0.6, "jensen_shannon", 2.0, True)


class Pair:
    """A student, a teacher with other tokens, and rows for both."""

    def __init__(self, folder) -> None:
        self.student = small_tokenizer()
        self.teacher = small_tokenizer(420, TEXT * 2 + ["the list of the names in order"] * 3)
        save_small(folder / "student", self.student)
        save_small(folder / "teacher", self.teacher, hidden=48, seed=1, tie_word_embeddings=False)
        self.folder = folder
        self.vocabulary = shared_vocabulary(self.student, self.teacher)
        encoders = [Encoder(tokenizer, 300) for tokenizer in (self.student, self.teacher)]
        encoder = AlignedEncoder(*encoders, self.vocabulary)
        found = encoder([(str(i), row) for i, row in enumerate(small_rows(8))])
        self.rows = found

    def live(self) -> AlignedTeacher:
        settings = TeacherSettings(teacher=str(self.folder / "teacher"), teacher_dtype="float32")
        return AlignedTeacher(LiveTeacher(settings, ModelSettings(), CPU), self.vocabulary)

    def run(self, batches: list[list[list[EncodedRow]]], flat: bool = False) -> tuple:
        """(loss, metrics, gradients) summed over batches of rows."""
        student = AutoModelForCausalLM.from_pretrained(self.folder / "student")
        return_loss(student)
        pads = self.student.pad_token_id, self.teacher.pad_token_id
        collate = AlignedCollator(Collator(pads[0], flat=flat), pads[1])
        made = [collate(rows) for rows in batches]
        total = 0.0
        for context, batch in zip(self.live().outputs(made), made, strict=True):
            with context as (outputs, _):
                inputs = LossInputs(batch["labels"], OBJECTIVE, len(self.student), outputs)
                out = student(batch["input_ids"], batch["position_ids"], inputs)
                total = total + torch.cat([out["loss"][None], out["metrics"]])
        total[0].backward()
        return total.detach(), [p.grad for p in student.parameters()]

    def truth(self) -> tuple:
        """The same in float64, from whole logits, row by row."""
        names = ("student", "teacher")
        models = [AutoModelForCausalLM.from_pretrained(self.folder / n).double() for n in names]
        outputs, total = self.live(), 0.0
        for row in self.rows:
            logits, labels, segments = [], [], []
            sides = (row, row.segments), (row.teacher, row.teacher_segments)
            tokenizers = self.student, self.teacher
            for model, (side, numbers), tokenizer in zip(models, sides, tokenizers, strict=True):
                target = torch.from_numpy(side.target_mask.copy())
                whole = model(torch.tensor(side.input_ids)[None]).logits[0, :, : len(tokenizer)]
                logits.append(whole[:-1][target[1:]])
                labels.append(torch.tensor(side.labels)[target])
                segments.append(numbers[side.target_mask])
            outputs.labels, outputs.segments, outputs.teacher_segments = labels[1], *segments
            loss, _ = segment_by_segment(
                logits[0], labels[0], logits[1].detach(), outputs, OBJECTIVE
            )
            total = total + loss
        total.backward()
        return total.item(), [p.grad for p in models[0].parameters()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


def check(found: list, wanted: list, tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


def test_loss_and_gradients_of_a_batch_equal_those_of_whole_logits_in_float64(pair):
    rows = [[row] for row in pair.rows]
    (loss, *_), gradients = pair.run([rows])
    wanted, true_gradients = pair.truth()
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    check(gradients, true_gradients, 2e-6)  # float32 rounding of a whole model


@pytest.mark.parametrize("split", ["one at a time", "packed", "flat", "with filler rows"])
def test_batching_changes_neither_loss_nor_gradients_nor_metrics(pair, split):
    rows = [[row] for row in pair.rows]
    wanted, true_gradients = pair.run([rows])
    batches = {
        "one at a time": [[row] for row in rows],
        "packed": [pack(pair.rows, 400)],
        "flat": [rows[:3], rows[3:]],
        "with filler rows": [
            rows[:5],
            [FilledUp(rows[:1], 2)[1]],
            rows[5:],
        ],
    }[split]
    found, gradients = pair.run(batches, flat=split == "flat")
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5)
    check(gradients, true_gradients, 1e-6)


def test_rows_with_hardly_any_aligned_target_are_refused():
    assert check_alignment(90, 100) is None
    assert "50.0% of the target tokens" in check_alignment(50, 100)
    with pytest.raises(ValueError, match="train on the teacher's text instead"):
        check_alignment(5, 100)
