"""GQA, VQAv2, VizWiz and tables of questions."""

import json

import datasets
import pytest
from PIL import Image

from tests.transformers_puma.conftest import make_picture
from transformers_puma.evaluation.gqa import GQA
from transformers_puma.evaluation.question_table import QuestionTable
from transformers_puma.evaluation.vizwiz import VizWiz
from transformers_puma.evaluation.vqav2 import VQAv2

from .pictures import judged, means, write_json_file, write_picture

SHORT = "Answer the question using a single word or phrase."


@pytest.fixture
def gqa(tmp_path) -> GQA:
    def question(text, answer, structural, balanced=True):
        kinds = {"semantic": "rel", "structural": structural, "detailed": "relO"}
        more = {"entailed": [], "equivalent": [], "semantic": [], "groups": {"global": None, "local": "x"}}
        return {"question": text, "answer": answer, "imageId": "n1", "isBalanced": balanced, "types": kinds, **more}

    write_picture(tmp_path / "images/n1.jpg")
    content = {
        "201": question("What is on the table?", "pizza", "query"),
        "202": question("Is it red?", "yes", "verify"),
        "203": question("Is it blue?", "no", "verify"),
        "204": question("Is it green?", "no", "verify", balanced=False),
    }
    write_json_file(tmp_path / "testdev_balanced_questions.json", content)
    return GQA(tmp_path)


def test_gqa(gqa, tmp_path):
    questions = {question.id: question for question in gqa.questions}
    assert questions.keys() == {"201", "202", "203"}  # the balanced ones
    assert questions["201"].prompt == f"What is on the table?\n{SHORT}"
    rows = judged(gqa, {"201": "Pizza.", "202": "Yes", "203": "Yes, no"})
    assert means(gqa.scores(rows)) == {
        "gqa": {"accuracy": pytest.approx(200 / 3)},
        "gqa: open": {"accuracy": 100},
        "gqa: binary": {"accuracy": 50},
    }
    submitted = json.loads(gqa.write_submission(rows, tmp_path).read_text())
    assert sorted(submitted, key=lambda row: row["questionId"])[0] == {"questionId": "201", "prediction": "pizza"}


def test_gqa_files_that_are_wrong(gqa):
    write_json_file(gqa.data / "test_balanced_questions.json", [])
    with pytest.raises(ValueError, match="must hold an object of questions by their ids, got a list"):
        GQA(gqa.data, "test_balanced")


def test_gqa_without_answers(gqa):
    content = {"9": {"question": "What?", "imageId": "n1", "isBalanced": True}}
    write_json_file(gqa.data / "test_balanced_questions.json", content)
    hidden = GQA(gqa.data, "test_balanced")
    rows = judged(hidden, {"9": "A cat"})
    assert rows == [{"id": "9", "answer": "A cat", "prediction": "a cat"}] and hidden.scores(rows) == {}


@pytest.fixture
def vqav2(tmp_path):
    def questions(*ids):
        rows = [{"image_id": 42, "question": f"What is {i}?", "question_id": i} for i in ids]
        return {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}, "questions": rows}

    def annotation(key, answer_type, answers):
        people = [
            {"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(answers, start=1)
        ]
        more = {"question_type": "what is", "multiple_choice_answer": answers[0], "image_id": 42}
        return {"question_id": key, "answer_type": answer_type, "answers": people, **more}

    write_picture(tmp_path / "val2014/COCO_val2014_000000000042.jpg")
    write_picture(tmp_path / "test2015/COCO_test2015_000000000042.jpg")
    for split, ids in {"val2014": [420, 421], "test-dev2015": [421], "test2015": [420, 421, 422]}.items():
        write_json_file(tmp_path / f"v2_OpenEnded_mscoco_{split}_questions.json", questions(*ids))
    annotations = [
        annotation(420, "number", ["two"] * 2 + ["3"] * 8),
        annotation(421, "other", ["red and white"] * 7 + ["red"] * 3),
    ]
    write_json_file(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    return tmp_path


def test_vqav2_with_answers(vqav2):
    benchmark = VQAv2(vqav2, "val2014")
    assert {question.prompt for question in benchmark.questions} == {f"What is {i}?\n{SHORT}" for i in (420, 421)}
    assert means(benchmark.scores(judged(benchmark, {420: "Two.", 421: "The Red"}))) == {
        "vqav2": {"accuracy": pytest.approx(75)},
        "vqav2: number": {"accuracy": pytest.approx(60)},
        "vqav2: other": {"accuracy": pytest.approx(90)},
    }


def test_vqav2_says_before_any_question_that_its_submission_could_not_be_written(vqav2):
    (vqav2 / "v2_OpenEnded_mscoco_test2015_questions.json").unlink()
    with pytest.raises(ValueError, match="test2015_questions.json is missing"):
        VQAv2(vqav2)


def test_vqav2_submission_answers_all_of_the_test(vqav2, tmp_path):
    benchmark = VQAv2(vqav2)
    assert benchmark.questions[0].picture == vqav2 / "test2015/COCO_test2015_000000000042.jpg"
    rows = judged(benchmark, {421: "A dog"})
    assert benchmark.scores(rows) == {}
    assert json.loads(benchmark.write_submission(rows, tmp_path).read_text()) == [
        {"question_id": 420, "answer": ""},
        {"question_id": 421, "answer": "dog"},
        {"question_id": 422, "answer": ""},
    ]


def test_vqav2_files_that_are_wrong(vqav2):
    with pytest.raises(ValueError, match="split='test' must be one of train2014"):
        VQAv2(vqav2, "test")
    write_json_file(vqav2 / "v2_mscoco_val2014_annotations.json", {"annotations": [{"question_id": 420}]})
    with pytest.raises(ValueError, match="has no answers, answer_type"):
        VQAv2(vqav2, "val2014")
    with pytest.raises(ValueError, match=r"train2014_annotations.json is missing"):
        VQAv2(vqav2, "train2014")
    write_json_file(vqav2 / "v2_mscoco_val2014_annotations.json", {"info": {}})
    with pytest.raises(ValueError, match="val2014_annotations.json has no annotations"):
        VQAv2(vqav2, "val2014")


@pytest.fixture
def vizwiz(tmp_path):
    answers = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 9
    answers += [{"answer": "soup", "answer_confidence": "maybe"}]
    row = {"image": "VizWiz_val_00000000.jpg", "question": "What is this?", "answers": answers, "answerable": 0}
    write_json_file(tmp_path / "val.json", [{**row, "answer_type": "unanswerable"}])
    write_json_file(tmp_path / "test.json", [{"image": "VizWiz_test_00000000.jpg", "question": "What is this?"}])
    for split in ("val", "test"):
        write_picture(tmp_path / split / f"VizWiz_{split}_00000000.jpg")
    return tmp_path


def test_vizwiz(vizwiz, tmp_path):
    known, hidden = VizWiz(vizwiz, "val"), VizWiz(vizwiz)
    insufficient = "When the provided information is insufficient, respond with 'Unanswerable'."
    assert known.questions[0].prompt == f"What is this?\n{insufficient}\n{SHORT}"
    scores = means(known.scores(judged(known, {"VizWiz_val_00000000.jpg": "Soup"})))
    assert scores == {row: {"accuracy": pytest.approx(30)} for row in ("vizwiz", "vizwiz: unanswerable")}
    rows = judged(hidden, {"VizWiz_test_00000000.jpg": "Unanswerable."})
    submitted = json.loads(hidden.write_submission(rows, tmp_path).read_text())
    assert submitted == [{"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"}]


TABLE = [
    {"image": "a.png", "question": "Which style?", "answer": "noto", "question_type": "style"},
    {"image": "a.png", "question": "Which style?", "answer": "noto", "question_type": "style"},
    {"image": "a.png", "question": "Which style?", "answer": "twemoji", "question_type": "style"},
    {"image": "a.png", "question": "How many?", "answer": ["2", "two"], "question_type": "count"},
]


@pytest.fixture
def table(tmp_path) -> QuestionTable:
    write_picture(tmp_path / "a.png")
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, TABLE)))
    return QuestionTable(tmp_path)


def test_table_against_the_majority(table):
    assert {question.prompt for question in table.questions} == {"Which style?", "How many?"}
    scores = means(table.scores(judged(table, {0: "twemoji", 1: "Noto.", 2: "twemoji", 3: "Two"})))
    assert scores["questions"] == {"accuracy": 75, "majority": 75, "gain": 0}
    assert scores["questions: style"] == pytest.approx({"accuracy": 200 / 3, "majority": 200 / 3, "gain": 0})
    assert scores["questions: count"] == {"accuracy": 100, "majority": 100, "gain": 0}
    worse = means(table.scores(judged(table, dict.fromkeys(range(4), "dog"))))
    assert worse["questions"] == {"accuracy": 0, "majority": 75, "gain": -75}


def test_transparent_parts_are_white_as_in_training(table):
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(table.data / "a.png")
    assert table.questions[0].open_picture().getpixel((0, 0)) == (255, 255, 255)


def test_table_as_a_dataset(table, tmp_path):
    rows = [{**row, "image": make_picture(5), "answer": row["answer"][0]} for row in TABLE]
    texts = {name: datasets.Value("string") for name in ("question", "answer", "question_type")}
    features = datasets.Features({"image": datasets.Image(), **texts})
    saved = datasets.DatasetDict({"heldout": datasets.Dataset.from_list(rows, features=features)})
    saved.save_to_disk(tmp_path / "saved")
    loaded = QuestionTable(tmp_path / "saved", "heldout")
    assert {(q.id, q.category) for q in loaded.questions} == {(i, TABLE[i]["question_type"]) for i in range(4)}
    assert loaded.questions[0].open_picture().tobytes() == make_picture(5).tobytes()
    with pytest.raises(ValueError, match="has no split 'test', only heldout"):
        QuestionTable(tmp_path / "saved")


def test_table_with_odd_but_valid_rows(table):
    """JSON may hold other line ends than that of its lines, and a type that is null is none."""
    rows = [{**TABLE[0], "answer": "yes\u2028no", "question_type": None}, TABLE[1]]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (table.data / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    loaded = QuestionTable(table.data)
    questions = {question.id: question for question in loaded.questions}
    assert questions[0].answers == ("yes\u2028no",)
    scores = loaded.scores(judged(loaded, {0: "no", 1: "noto"}))
    assert scores.keys() == {"questions", "questions: style"}


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"answer": 7}, "answer must be a text or a list of texts, got 7"),
        ({"question": None}, "row 0 of .*test.jsonl has no question"),
        ({"question": 7}, "question must be a text, got 7"),
        ({"image": None}, "row 0 of .*test.jsonl has no image"),
    ],
)
def test_table_with_a_value_that_is_wrong(table, row, error):
    (table.data / "test.jsonl").write_text(json.dumps({**TABLE[0], **row}))
    with pytest.raises(ValueError, match=error):
        QuestionTable(table.data)


def test_table_that_is_wrong(table):
    (table.data / "test.jsonl").write_text("[1, 2]")
    with pytest.raises(ValueError, match="row 0 of .* must be an object with image, question, answer, got"):
        QuestionTable(table.data)
    (table.data / "test.jsonl").write_text('{"image": "a.png", "question": "What?"}')
    with pytest.raises(ValueError, match=r"row 0 of .*test.jsonl has no answer"):
        QuestionTable(table.data)
    (table.data / "test.jsonl").write_text('{"image": "a.png", "question": "What?", "answer": []}')
    with pytest.raises(ValueError, match="must be a text or a list of texts"):
        QuestionTable(table.data)
    (table.data / "test.jsonl").write_text('{"image"')
    with pytest.raises(ValueError, match="line 1 is not valid JSON"):
        QuestionTable(table.data)
