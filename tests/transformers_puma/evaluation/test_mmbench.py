import base64
import csv

import openpyxl
import pytest

from tests.transformers_puma.conftest import make_picture
from transformers_puma.evaluation.mmbench import MMBench, choose_option

from .pictures import judged, means, write_picture

# As in mmbench_dev_20230712.tsv
COLUMNS = (
    "index question hint A B C D answer category image source l2-category comment split".split()
)  # fmt: skip
LETTER = "Answer with the option's letter from the given choices directly."


def write_tsv(folder, rows, split="dev_20230712", columns=COLUMNS):
    with (folder / f"mmbench_{split}.tsv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def make_row(index, options, answer, image, **more):
    cells = dict(zip("ABCD", options, strict=False))
    row = {"index": index, "question": "What is it?", "answer": answer, "image": image, **cells}
    return {"category": "object", "source": "x", "l2-category": "coarse", "split": "dev", **row, **more}


@pytest.fixture
def image(tmp_path) -> str:
    return base64.b64encode(write_picture(tmp_path / "picture.png", seed=3).read_bytes()).decode()


@pytest.fixture
def rotated(tmp_path, image) -> MMBench:
    """Two questions with their rotated copies in the file, as the benchmark's own files have them."""
    write_tsv(
        tmp_path,
        [
            make_row(5, ["cat", "dog"], "A", image, hint="Look closely."),
            make_row(7, ["one", "two", "three"], "C", image, **{"l2-category": "fine"}),
            make_row(1_000_005, ["dog", "cat"], "B", "5", hint="Look closely."),
            make_row(1_000_007, ["two", "three", "one"], "B", "7", **{"l2-category": "fine"}),
            make_row(2_000_007, ["three", "one", "two"], "A", "7", **{"l2-category": "fine"}),
        ],
    )
    return MMBench(tmp_path)


def test_questions_and_pictures(rotated):
    questions = {question.id: question for question in rotated.questions}
    assert questions[5].prompt == f"Look closely.\nWhat is it?\nA. cat\nB. dog\n{LETTER}"
    assert questions[1_000_007].prompt == f"What is it?\nA. two\nB. three\nC. one\n{LETTER}"
    assert questions[2_000_007].answers == ("A",) and questions[2_000_007].unit == 7
    assert questions[1_000_005].open_picture().tobytes() == make_picture(3).tobytes()


def test_a_question_counts_if_every_rotation_is_right(rotated):
    answers = {5: "A", 1_000_005: "B", 7: "C", 1_000_007: "A", 2_000_007: "A"}
    assert means(rotated.scores(judged(rotated, answers))) == {
        "mmbench": {"accuracy": 50, "single_pass": 100},
        "mmbench: coarse": {"accuracy": 100},
        "mmbench: fine": {"accuracy": 0},
    }


def test_rotations_are_made_where_the_file_has_none(tmp_path, image):
    write_tsv(tmp_path, [make_row(7, ["one", "two", "three"], "C", image)])
    made = {question.id: question for question in MMBench(tmp_path).questions}
    assert [made[i].options for i in (7, 1_000_007, 2_000_007)] == [
        ("one", "two", "three"),
        ("two", "three", "one"),
        ("three", "one", "two"),
    ]
    assert all(q.options["ABC".index(q.answers[0])] == "three" for q in made.values())
    assert made[1_000_007].prompt == f"What is it?\nA. two\nB. three\nC. one\n{LETTER}"


def test_a_limited_run_keeps_questions_whole(rotated):
    limited = MMBench(rotated.data, limit=1)
    assert len({question.unit for question in limited.questions}) == 1
    assert len(limited.questions) == len(limited.questions[0].options)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(b)", ""),
        ("(C)", "C"),
        ("The answer is C: a sheep", "C"),
        ("A or B", ""),
        ("A dog is in the picture", "B"),  # the article, then the text of an option
        ("a cat and a dog", ""),
        ("D", ""),  # there are three options
        ("", ""),
    ],
)
def test_reading_an_answer(answer, expected):
    assert choose_option(answer, ["cat", "dog", "sheep"]) == expected


def test_submission_of_a_hidden_test(tmp_path, image):
    columns = [name for name in COLUMNS if name != "answer"]
    rows = [make_row(i, ["cat", "dog"], "", image) for i in (1, 2)]
    write_tsv(tmp_path, rows, "test_en_20231003", columns)
    benchmark = MMBench(tmp_path, "test_en_20231003")
    rows = judged(benchmark, {1: "A", 2: "the dog\x00"})
    assert benchmark.scores(rows) == {}
    sheet = openpyxl.load_workbook(benchmark.write_submission(rows, tmp_path)).active
    assert list(sheet.values) == [
        ("index", "question", "A", "B", "C", "D", "prediction", "split"),
        (1, "What is it?", "cat", "dog", None, None, "A", "dev"),
        (2, "What is it?", "cat", "dog", None, None, "the dog", "dev"),
    ]


def test_files_that_are_wrong(tmp_path, image):
    with pytest.raises(ValueError, match=r"mmbench_dev_20230712.tsv is missing"):
        MMBench(tmp_path)
    write_tsv(tmp_path, [make_row(1, ["cat", "dog"], "C", image)])
    with pytest.raises(ValueError, match="answer 'C' is none of its 2 options"):
        MMBench(tmp_path)
    file = tmp_path / "mmbench_dev_20230712.tsv"
    file.write_text(f"{file.read_text().rstrip()}\n2\tWhat is it?\n")
    with pytest.raises(ValueError, match="row 2 has fewer cells than the header"):
        MMBench(tmp_path)
    file.write_text(file.read_text().splitlines()[0])
    with pytest.raises(ValueError, match="mmbench_dev_20230712.tsv holds no questions"):
        MMBench(tmp_path)
    write_tsv(tmp_path, [make_row(1, ["cat", "dog"], "A", "9")])
    with pytest.raises(ValueError, match="picture of row 1 is that of row 9"):
        MMBench(tmp_path)
    write_tsv(tmp_path, [make_row(1_000_004, ["cat", "dog"], "A", image)])
    with pytest.raises(ValueError, match="rotated copy of row 4"):
        MMBench(tmp_path)
