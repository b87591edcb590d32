"""`LateStep`: a step that has been enqueued, and whose outcome the host looks at when it has time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llm2_fast.backends.report import Receipt
from llm2_fast.results import StepOutput

Reported = dict[str, torch.Tensor]  # on the host, by name


class LateStep:
    """Waits for a step when it has to.

    Args:
        receipt: Of what the step reports.
        note: Called once with the report, as soon as somebody has waited for it: keeps the host's books.
        build: Makes the outputs of the report.
    """

    def __init__(
        self, receipt: Receipt, note: Callable[[Reported], None], build: Callable[[Reported], list[StepOutput]]
    ) -> None:
        self._receipt, self._note, self._build = receipt, note, build
        self._report: Reported | None = None
        self._outputs: list[StepOutput] | None = None

    @property
    def known(self) -> bool:
        """The host has waited for it."""
        return self._report is not None

    def wait(self) -> Reported:
        """Wait for the report."""
        if self._report is None:
            self._report = self._receipt.wait()
            self._note(self._report)
        return self._report

    def outputs(self) -> list[StepOutput]:
        """Wait, and one output per sequence."""
        if self._outputs is None:
            self._outputs = self._build(self.wait())
        return self._outputs
