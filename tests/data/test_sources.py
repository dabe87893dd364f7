import json

import pytest

from lorajax.data.sources import open_source
from lorajax.errors import UserError

ROWS = [{"text": "first"}, {"text": "second, with a comma"}, {"text": "third\nline é"}]


def read(path, **options):
    return list(open_source(str(path), **options).rows())


def test_every_kind_gives_the_same_rows(tmp_path):
    import pandas

    (tmp_path / "a.jsonl").write_text(
        "\n\n".join(json.dumps(row) for row in ROWS) + "\n", encoding="utf-8-sig"
    )
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": ROWS}))
    pandas.DataFrame(ROWS).to_csv(tmp_path / "a.csv", index=False)
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "a.parquet")
    origins = {}
    for name in ("a.jsonl", "a.json", "wrapped.json", "a.csv", "a.parquet"):
        rows = read(tmp_path / name)
        assert [row.fields for row in rows] == ROWS, name
        origins[name] = [row.origin for row in rows]
    assert origins["a.jsonl"] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:5"]
    assert origins["a.csv"] == ["a.csv:2", "a.csv:3", "a.csv:4"]
    assert origins["a.json"][2] == "a.json: row 3"
    assert origins["a.parquet"][2] == "a.parquet: row 3"


def test_folder_is_read_in_order_and_skips_descriptions(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "a.csv").write_text("text\na\n")
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "c"}\n')
    (tmp_path / ".hidden.jsonl").write_text("not json")
    (tmp_path / "README.md").write_text("about the data")
    rows = read(tmp_path)
    assert [row.fields["text"] for row in rows] == ["a", "b", "c"]
    assert rows[2].origin == "sub/c.jsonl:1"


def test_folder_of_texts(tmp_path):
    (tmp_path / "two.md").write_text("# Two\n")
    (tmp_path / "one.txt").write_text("One.\n")
    assert [row.fields for row in read(tmp_path)] == [{"text": "One.\n"}, {"text": "# Two\n"}]
    assert [row.fields for row in read(tmp_path / "one.txt")] == [{"text": "One.\n"}]


def test_digest_follows_contents_not_times(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    first = open_source(str(path)).digest
    path.write_text('{"text": "b"}\n')
    second = open_source(str(path)).digest
    path.write_text('{"text": "a"}\n')
    assert open_source(str(path)).digest == first != second


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"text": "a"}\n{"text": \n', r"rows\.jsonl:2: not a row of JSON"),
        ("rows.jsonl", b'{"text": "a"}\n\n{"text": "\xff"}\n', r"rows\.jsonl:3: .*utf-8"),
        ("rows.jsonl", b'["a"]\n', r"rows\.jsonl:1: a row must be an object"),
        ("rows.json", b'{"text": "a"}\n{"text": "b"}\n', r"rows\.json:2: .*name the file \.jsonl"),
        ("rows.json", b'{"rows": []}', r"rows\.json: expected a list"),
        ("rows.json", b'[{"text": "a"}, 3]', r"rows\.json: row 2: a row must be an object"),
        ("rows.csv", b"text,other\na,b\nc\n", r"rows\.csv:3: .* 2 of the header"),
        ("rows.csv", b'text\n"a\n', r"rows\.csv:2: not CSV"),
        ("rows.csv", b"text\n\xff\n", r"rows\.csv:2: .*UTF-8"),
        ("rows.csv", b"\xef\xbb\xbf" + b"text\n" * 9000 + b"\xc3\n", r"rows\.csv:9001: .*UTF-8"),
        ("rows.csv", b"text\na\nb\xc3", r"rows\.csv:3: .*UTF-8"),
        ("rows.parquet", b"nothing of the kind", r"rows\.parquet: not a Parquet file"),
        ("rows.txt", b"\xff\xfe\xff", r"rows\.txt: not text in UTF-8"),
        ("rows.xlsx", b"", r"data\.path: .*rows\.xlsx is not one of the kinds.*\.jsonl"),
    ],
)
def test_what_does_not_parse_names_file_and_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"data\.eval_path: no such file or folder: .*nothing\.jsonl"):
        read(tmp_path / "nothing.jsonl", key="data.eval_path")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file that can be read"):
        read(tmp_path / "empty")


def test_hub_data_set(monkeypatch):
    import datasets

    def load(name, configuration, split):
        assert (name, configuration, split) == ("someone/things", "small", "test")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read("someone/things:small", split="test")
    assert [row.fields for row in rows] == ROWS
    assert rows[1].origin == "someone/things:small[test]: row 2"


def test_hub_data_set_out_of_reach(monkeypatch):
    import datasets

    def load(*_, **__):
        raise ConnectionError("Couldn't reach 'someone/things' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"data\.path: someone/things .*Couldn't reach.*without a connection"):
        read("someone/things")
