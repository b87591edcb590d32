"""Incremental text equals the text of all tokens, whatever bytes the tokens split."""

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm2_fast.detokenizer import Detokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer():
    """One token per byte, so that characters beyond ASCII take several tokens."""
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(ALPHABET)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=ALPHABET[0])


TOKENIZER = byte_tokenizer()
TEXTS = st.text(st.sampled_from("abc é€😀\n"), max_size=20)


def run(token_ids, stop=()):
    detokenizer = Detokenizer(TOKENIZER, stop)
    pieces = []
    for token in token_ids:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped:
            break
    pieces.append(detokenizer.finish())
    return detokenizer, pieces


@given(TEXTS)
def test_pieces_join_to_the_text(text):
    detokenizer, pieces = run(TOKENIZER(text)["input_ids"])
    assert "".join(pieces) == detokenizer.text == text
    assert not detokenizer.stopped


@given(TEXTS, st.lists(st.text(st.sampled_from("abc é€😀"), min_size=1, max_size=3), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(text, stop):
    detokenizer, pieces = run(TOKENIZER(text)["input_ids"], tuple(stop))
    found = [text.index(s) for s in stop if s in text]
    assert detokenizer.stopped == bool(found)
    # Of two stop strings the one that is complete first ends the text.
    assert "".join(pieces) == detokenizer.text
    assert text.startswith(detokenizer.text)
    if found:
        assert not any(s in detokenizer.text for s in stop)
        assert len(detokenizer.text) >= min(found)


def test_an_incomplete_character_is_held_back():
    ids = TOKENIZER("é")["input_ids"]
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.push(token) for token in ids] == ["", "é"]


def test_a_character_that_stays_incomplete_is_shown_as_such():
    detokenizer = Detokenizer(TOKENIZER)
    assert detokenizer.push(TOKENIZER("é")["input_ids"][0]) == ""
    assert detokenizer.finish() == "\N{REPLACEMENT CHARACTER}"
