"""A Parquet table says what the same records say as lines of JSON."""

import io
import json

import pytest
from PIL import Image as PILImage

from mm_interleaved.documents.document_files import read_documents
from mm_interleaved.errors import InputError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

RECORDS = [
    {"id": "a", "content": [{"type": "text", "text": "Ä <image>"}, {"type": "image", "image": "given.png"}],
     "layout": "T I", "meta": {"title": "A"}},
    {"id": "b", "content": [{"type": "image", "image": "given.png"}], "generation": {"seed": 3}},
]  # fmt: skip


@pytest.fixture
def png(tmp_path):
    buffer = io.BytesIO()
    PILImage.new("RGB", (4, 3), (9, 8, 7)).save(buffer, format="PNG")
    (tmp_path / "given.png").write_bytes(buffer.getvalue())
    return buffer.getvalue()


def written(tmp_path, rows, schema=None):
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: [row.get(name) for row in rows] for name in names}, schema=schema)
    pq.write_table(table, tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def test_rows_are_the_documents_of_the_same_lines(tmp_path, png):
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    assert read_documents(written(tmp_path, RECORDS)) == read_documents(lines)


def test_columns_of_text_may_hold_the_json_of_a_field(tmp_path, png):
    rows = [
        {name: json.dumps(value) if isinstance(value, dict | list) else value for name, value in each.items()}
        for each in RECORDS
    ]
    assert read_documents(written(tmp_path, rows)) == read_documents(written(tmp_path, RECORDS))


@pytest.mark.parametrize("image", [lambda png: {"bytes": png, "path": None}, lambda png: png])
def test_images_may_stand_in_the_table(tmp_path, png, image):
    rows = [{"id": "a", "content": [{"type": "image", "image": image(png)}]}]
    [document] = read_documents(written(tmp_path, rows))
    assert document.images[0].source == png


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"id": "a", "content": [{"type": "text", "text": "x"}], "meta": '{"a": 1, "a": 2}'}],
         r"rows\.parquet: row 1: meta: found the field 'a' twice"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], r"row 2: id: found 'a', which .*row 1"),
        ([{"id": "a", "text": "x", "score": float("nan")}], r"row 1: found NaN, which is not JSON"),
        ([{"id": "a", "words": "x"}], r"row 1: found the fields id, words, expected those of a document"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named(tmp_path, rows, sentence):
    with pytest.raises(InputError, match=sentence):
        read_documents(written(tmp_path, rows))


def test_values_that_json_has_no_form_for_are_named(tmp_path):
    schema = pa.schema([("text", pa.string()), ("time", pa.timestamp("s"))])
    with pytest.raises(InputError, match=r"row 1: time: found a datetime, expected text, numbers"):
        read_documents(written(tmp_path, [{"text": "x", "time": 5}], schema))


def test_a_table_that_is_damaged_or_none_is_named(tmp_path, png):
    path = written(tmp_path, RECORDS)
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"PAR1 and more", whole[:40] + b"xxxx" + whole[44:]):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"rows\.parquet: damaged, or no table"):
            read_documents(path)
    with pytest.raises(InputError, match="there is no such file"):
        read_documents(tmp_path / "other.parquet")
