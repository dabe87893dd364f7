import numpy as np
import pytest

from lorajax.data import cache, load_documents
from lorajax.data.documents import Documents, cut_documents, split_documents
from lorajax.data.tokens import Encoder
from lorajax.errors import UserError


def chat(*contents):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


def load(config, tokenizer, context_length=4096, seed=0, **options):
    return load_documents(config, tokenizer, context_length=context_length, seed=seed, **options)


def as_lists(documents):
    return [(tokens.tolist(), mask.tolist()) for tokens, mask in documents]


@pytest.fixture
def encodings(monkeypatch):
    """Counts the documents that are tokenised."""
    counted = []
    encode = Encoder.encode

    def counting(self, documents):
        counted.extend(documents)
        return encode(self, documents)

    monkeypatch.setattr(Encoder, "encode", counting)
    return counted


def numbered(*lengths, first_target=1):
    """Documents whose tokens count on from 0."""
    ends = np.cumsum(lengths)
    return Documents.from_pairs(
        (range(end - n, end), [i >= first_target for i in range(n)])
        for n, end in zip(lengths, ends, strict=True)
    )


def test_documents_are_a_sequence():
    documents = numbered(3, 2, 4)
    assert len(documents) == 3
    assert as_lists(documents[1:]) == [([3, 4], [False, True]), ([5, 6, 7, 8], [False, True, True, True])]
    assert documents.targets.tolist() == [2, 1, 3]
    assert documents[-1][0].tolist() == [5, 6, 7, 8]
    with pytest.raises(IndexError):
        documents[3]


def test_the_context_is_that_of_the_average_token():
    assert numbered(10, 30).context == (10 * 10 + 30 * 30) // 40
    assert numbered(7, 7).context == 7
    assert Documents.from_pairs([]).context == 0


def test_a_checksum_is_of_the_documents_themselves():
    pairs = [([1, 2, 3], [False, True, True]), ([4, 5], [False, True])]
    expected = Documents.from_pairs(pairs).crc32()
    among_others = Documents.from_pairs([([9], [True]), *pairs])
    assert among_others[1:].crc32() == expected
    others = [
        pairs[::-1],
        [([1, 2, 3], [False, True, True]), ([4, 6], [False, True])],
        [([1, 2, 3], [False, False, True]), ([4, 5], [True, True])],
        [([1, 2], [False, True]), ([3, 4, 5], [True, False, True])],
    ]
    assert len({expected, *(Documents.from_pairs(other).crc32() for other in others)}) == 5


def test_load_counts(write_rows, data_config, tokenizer):
    rows = [chat("hello", "the fox"), chat("a", "b", "c", "d"), {"text": "hello"}]
    train, evaluation, stats, eval_stats = load(data_config(write_rows(rows)), tokenizer)
    assert evaluation is None and eval_stats is None
    assert (stats.rows, stats.documents, stats.masked_out) == (3, 3, 0)
    assert stats.tokens == sum(len(tokens) for tokens, _ in train)
    assert stats.target_tokens == sum(int(mask[1:].sum()) for _, mask in train)
    assert tokenizer.decode(train[0][0]).endswith("the fox<|im_end|>\n")
    assert train[0][0].dtype == np.int32 and train[0][1].dtype == bool


def test_many_batches_keep_their_order(write_rows, data_config, tokenizer):
    path = write_rows([{"text": f"row {i}"} for i in range(2345)])
    train = load(data_config(path), tokenizer).train
    assert [tokenizer.decode(train[i][0]) for i in (0, 999, 1000, 2344)] == [
        f"row {i}<|im_end|>" for i in (0, 999, 1000, 2344)
    ]


def test_truncate_drop_split():
    documents = numbered(5, 12, 3)
    cut, stats = cut_documents(documents, 5, "truncate")
    assert [tokens.tolist() for tokens, _ in cut] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [17, 18, 19]]
    assert (stats.rows, stats.documents, stats.truncated, stats.dropped, stats.split) == (3, 3, 1, 0, 0)
    assert (stats.tokens, stats.target_tokens) == (13, 10)
    cut, stats = cut_documents(documents, 5, "drop")
    assert [tokens.tolist() for tokens, _ in cut] == [[0, 1, 2, 3, 4], [17, 18, 19]]
    assert (stats.rows, stats.documents, stats.truncated, stats.dropped, stats.split) == (3, 2, 0, 1, 0)
    cut, stats = cut_documents(documents, 5, "split")
    assert [tokens.tolist() for tokens, _ in cut] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [9, 10, 11, 12, 13],
        [13, 14, 15, 16],
        [17, 18, 19],
    ]
    assert (stats.rows, stats.documents, stats.truncated, stats.dropped, stats.split) == (3, 5, 0, 0, 1)


def test_split_loses_no_target():
    documents = numbered(*range(1, 40), first_target=4)
    for max_length in (2, 3, 7, 38):
        cut, stats = cut_documents(documents, max_length, "split")
        assert stats.target_tokens == documents.targets.sum() == cut.targets.sum()
        targets = np.concatenate([tokens[1:][mask[1:]] for tokens, mask in cut])
        assert len(np.unique(targets)) == len(targets)
        assert cut.lengths.max() <= max_length


def test_documents_without_targets_are_counted_and_left_out():
    # After truncation to 4 tokens, only the first token of what is learnt is left, or none.
    documents = Documents.from_pairs(
        [(range(6), [0, 0, 0, 1, 1, 1]), (range(6), [0, 0, 0, 0, 1, 1]), (range(1), [1]), ([], [])]
    )
    cut, stats = cut_documents(documents, 4, "truncate")
    assert as_lists(cut) == [([0, 1, 2, 3], [False, False, False, True])]
    assert (stats.rows, stats.documents, stats.truncated, stats.masked_out) == (4, 1, 2, 3)


def test_second_load_does_not_tokenise(write_rows, data_config, tokenizer, encodings):
    path = write_rows([chat("hello", "the fox"), chat("a", "b")])
    first = load(data_config(path), tokenizer).train
    assert len(encodings) == 2
    again = load(data_config(path, max_length=14, overlong="split"), tokenizer).train
    assert len(encodings) == 2
    assert len(again) > len(first)
    assert as_lists(load(data_config(path), tokenizer).train) == as_lists(first)
    load(data_config(path, train_on_prompt=True), tokenizer)
    assert len(encodings) == 4
    write_rows([chat("hello", "the fix"), chat("a", "b")])
    load(data_config(path), tokenizer)
    assert len(encodings) == 6


def test_cache_follows_tokenizer_template_and_eos(
    write_rows, data_config, tokenizer, make_tokenizer, marked_template, encodings
):
    path = write_rows([chat("hello", "the fox")])
    load(data_config(path), tokenizer)
    load(data_config(path), make_tokenizer(marked_template))
    load(data_config(path), make_tokenizer(eos_token="<|end|>"))
    load(data_config(path), tokenizer, eos_ids=(0,))
    assert len(encodings) == 4


@pytest.mark.parametrize("damage", ["shorten", "change", "remove", "describe"])
def test_damaged_cache_is_rebuilt(write_rows, data_config, tokenizer, encodings, tmp_path, damage):
    config = data_config(write_rows([chat("hello", "the fox"), chat("a", "b")]))
    expected = as_lists(load(config, tokenizer).train)
    (tokens,) = (tmp_path / "cache").glob("*/tokens.npy")
    if damage == "shorten":
        tokens.write_bytes(tokens.read_bytes()[:-4])
    elif damage == "change":
        tokens.write_bytes(tokens.read_bytes()[:-4] + b"\1\0\0\0")
    elif damage == "remove":
        tokens.unlink()
    else:
        (tokens.parent / "arrays.json").write_text("{")
    assert as_lists(load(config, tokenizer).train) == expected
    assert len(encodings) == 4
    assert as_lists(load(config, tokenizer).train) == expected
    assert len(encodings) == 4


def test_failed_tokenisation_leaves_no_cache(write_rows, data_config, tokenizer, tmp_path):
    path = write_rows([chat("hello", "the fox"), {"nothing": 1}])
    with pytest.raises(UserError, match=r"rows\.jsonl:2: "):
        load(data_config(path), tokenizer)
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder(None) == tmp_path / "lorajax" / "data"
    assert cache.cache_folder("elsewhere").name == "elsewhere"


def test_cache_that_cannot_be_written(write_rows, tmp_path, tokenizer, data_config):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"data\.cache_dir: .*cache"):
        load(data_config(write_rows([{"text": "a b c"}])), tokenizer)


def test_evaluation_by_fraction(write_rows, data_config, tokenizer):
    config = data_config(write_rows([{"text": f"row {i}"} for i in range(50)]), eval_fraction=0.1)
    train, evaluation, stats, eval_stats = load(config, tokenizer)
    assert (stats.rows, eval_stats.rows) == (45, 5)
    texts = [tokenizer.decode(tokens) for tokens, _ in [*train, *evaluation]]
    assert sorted(texts) == sorted(f"row {i}<|im_end|>" for i in range(50))
    assert as_lists(load(config, tokenizer).eval) == as_lists(evaluation)
    assert as_lists(load(config, tokenizer, seed=1).eval) != as_lists(evaluation)


def test_fraction_leaves_something_on_both_sides():
    documents = numbered(2, 2, 2)
    assert [len(part) for part in split_documents(documents, 0.01, 0)] == [2, 1]
    assert [len(part) for part in split_documents(documents, 0.99, 0)] == [1, 2]
    with pytest.raises(UserError, match="eval_fraction"):
        split_documents(numbered(2), 0.5, 0)


def test_evaluation_by_file(write_rows, data_config, tokenizer):
    held_out = write_rows([{"text": "held out"}], "held_out.jsonl")
    splits = load(data_config(write_rows([{"text": "learnt"}]), eval_path=held_out), tokenizer)
    assert [tokenizer.decode(tokens) for tokens, _ in splits.eval] == ["held out<|im_end|>"]
    assert [tokenizer.decode(tokens) for tokens, _ in splits.train] == ["learnt<|im_end|>"]
    with pytest.raises(UserError, match=r"data\.eval_path"):
        load(data_config(held_out, eval_path="nothing.jsonl"), tokenizer)


def test_max_length_over_the_context(write_rows, data_config, tokenizer):
    config = data_config(write_rows([{"text": "a b"}]), max_length=2048)
    with pytest.raises(UserError, match=r"data\.max_length is 2048, .*context is 512"):
        load(config, tokenizer, context_length=512)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_empty_data(tmp_path, data_config, tokenizer, name):
    (tmp_path / name).write_text("[]" if name.endswith(".json") else "")
    with pytest.raises(UserError, match=rf"data\.path: .*{name} holds no rows"):
        load(data_config(str(tmp_path / name)), tokenizer)


def test_every_label_masked(write_rows, data_config, tokenizer, make_tokenizer, marked_template):
    path = write_rows([chat("hello " * 50, "the fox"), chat("hello " * 60, "the fox")])
    with pytest.raises(UserError, match=r"all 2 rows .* begins after data\.max_length \(16 tokens\)"):
        load(data_config(path, max_length=16), tokenizer)
    with pytest.raises(UserError, match=r"all 2 rows .* longer than data\.max_length"):
        load(data_config(path, max_length=16, overlong="drop"), tokenizer)
    marks = "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    empty = marked_template.replace(
        marks, "{% generation %}{% endgeneration %}{{ ' ' + message['content'] + '<|im_end|>' }}"
    )
    assert empty != marked_template
    with pytest.raises(UserError, match=r"every label is masked: none of the 2 rows .*generation"):
        load(data_config(path), make_tokenizer(empty))
