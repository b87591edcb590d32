"""Verifiers (System 2): the three kinds behind one interface, and the session through which they score."""

from llm2_fast.verifier.full import FullVerifier
from llm2_fast.verifier.head import HeadVerifier, ScoreHead
from llm2_fast.verifier.lora import LoraVerifier
from llm2_fast.verifier.session import VerifierSession
from llm2_fast.verifier.verifier import Verifier

__all__ = ["FullVerifier", "HeadVerifier", "LoraVerifier", "ScoreHead", "Verifier", "VerifierSession"]
