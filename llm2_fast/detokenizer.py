"""`Detokenizer`: text from tokens as they come, up to a stop string."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turns a sample's tokens into text incrementally.

    Only a window of recent tokens is decoded again for each new one. Text is held back while its last character may be
    incomplete, or while it may be the beginning of a stop string.

    Args:
        tokenizer: The model's.
        stop: Strings that end the text; it is cut before the first one found.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._token_ids: list[int] = []
        self._window = self._decoded = 0  # tokens [window, decoded) are context for decoding the next ones
        self._emitted = 0
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Take one token, return the text it completes."""
        self._token_ids.append(token_id)
        known = self._decode(self._token_ids[self._window : self._decoded])
        text = self._decode(self._token_ids[self._window :])
        if len(text) > len(known) and not text.endswith(_INCOMPLETE):
            self._append(text[len(known) :])
            self._window, self._decoded = self._decoded, len(self._token_ids)
        held = max(map(len, self._stop), default=1) - 1
        return self._emit(len(self.text) if self.stopped else len(self.text) - held)

    def finish(self) -> str:
        """The text held back so far. Call once, after the last token."""
        if not self.stopped:
            known = self._decode(self._token_ids[self._window : self._decoded])
            self._append(self._decode(self._token_ids[self._window :])[len(known) :])
        return self._emit(len(self.text))

    def _append(self, text: str) -> None:
        start = max(0, len(self.text) - max(map(len, self._stop), default=0))
        self.text += text
        found = [index for stop in self._stop if (index := self.text.find(stop, start)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _emit(self, end: int) -> str:
        start, self._emitted = self._emitted, max(self._emitted, end)
        return self.text[start : self._emitted]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)
