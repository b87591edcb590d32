"""Packed passes: all pairs of several solutions at once against one pair at a time."""

import pytest
import torch
from transformers.modeling_outputs import SequenceClassifierOutput

import tiny
from llm2_fast.reference import pairwise_loss
from llm2_fast.train.classifier import make_classifier
from llm2_fast.train.config import TrainingConfig
from llm2_fast.train.examples import Example
from llm2_fast.train.packing import NO_PAIR, pack, packed_loss
from tolerances import TOLERANCES

CONFIG = TrainingConfig.for_kind("lora", lora_rank=3)
# Position, positive and negative id. Ragged; siblings at one position, positives that the solution does not contain.
PAIRS = [
    ([5, 6, 7, 8, 9, 10, 11, 12, 13], [(4, 9, 20), (4, 9, 21), (8, 13, 14), (1, 6, 7), (7, 40, 12), (7, 12, 41)]),
    ([3, 4], [(1, 4, 4 + 1)]),
    ([30, 31, 32, 33], [(3, 50, 33), (3, 50, 51), (2, 32, 2)]),
]
EXAMPLES = [Example.from_pairs(input_ids, pairs) for input_ids, pairs in PAIRS]


def make(family, kind):
    """A classifier in float64, all that trains random."""
    classifier = make_classifier(tiny.causal_lm(family).base_model, CONFIG, lora=kind == "lora").double().eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in classifier.named_parameters():
        if "lora_" in name or "score" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return classifier


def one_at_a_time(classifier, examples):
    """The loss with a forward pass of its own, without masks or positions, for every token of every pair."""
    inner = classifier.get_base_model() if hasattr(classifier, "peft_config") else classifier

    def score(tokens):
        return inner.score(inner.base_model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0, -1])

    margins = [
        score([*input_ids[:position], positive]) - score([*input_ids[:position], negative])
        for input_ids, pairs in examples
        for position, positive, negative in pairs
    ]
    return torch.log1p(torch.exp(-torch.cat(margins))).mean()


def gradients(classifier, loss):
    classifier.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in classifier.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loss_and_gradients_are_those_of_single_pairs(family, kind):
    classifier = make(family, kind)
    expected = one_at_a_time(classifier, PAIRS)
    expected_gradients = gradients(classifier, expected)
    batch = pack(EXAMPLES)
    labels = batch.pop("labels")
    actual = packed_loss(classifier(**batch), labels)
    actual_gradients = gradients(classifier, actual)
    tolerance = TOLERANCES["packing", torch.float64]
    torch.testing.assert_close(actual, expected, **tolerance)
    assert actual_gradients.keys() == expected_gradients.keys()
    assert len(actual_gradients) > (10 if kind == "full" else 5)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(actual_gradients[name], gradient, **tolerance, msg=name)


def test_parts_of_a_batch_add_up_to_its_mean():
    classifier = make("llama", "full")
    expected = gradients(classifier, one_at_a_time(classifier, PAIRS))
    num_pairs = sum(map(len, EXAMPLES))
    classifier.zero_grad()
    for part in ([EXAMPLES[0], None], [None], EXAMPLES[1:]):
        batch = pack(part)
        labels = batch.pop("labels")
        packed_loss(classifier(**batch), labels, num_items_in_batch=num_pairs).backward()
    for name, parameter in classifier.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], **TOLERANCES["packing", torch.float64], msg=name)


def test_layout():
    batch = pack(EXAMPLES)
    # Nine tokens of the solution, six negatives, one positive that is not in it; and padding to the longest.
    first = EXAMPLES[0]
    assert batch["input_ids"].shape == (3, 16)
    negatives = [20, 21, 14, 7, 12, 41]
    assert batch["input_ids"][0].tolist() == [*range(5, 14), *negatives, 40]
    assert batch["position_ids"][0].tolist() == [*range(9), 4, 4, 8, 1, 7, 7, 7]
    assert batch["labels"][0].tolist() == [NO_PAIR] * 9 + [4, 4, 8, 1, 15, 7] + [NO_PAIR]
    assert int((batch["labels"] != NO_PAIR).sum()) == sum(map(len, EXAMPLES))
    assert first.where(torch.tensor([False, True, False, False, True, False])).branch_ids.tolist() == [21, 12, 40]
    assert first.where(torch.zeros(6, dtype=torch.bool)) is None
    # What comes behind the last position compared is not computed.
    assert Example.from_pairs([5, 6, 7, 8], [(1, 6, 9)]).input_ids == [5, 6]


def test_loss_is_that_of_the_definition():
    positive, negative = torch.tensor([1.0, -2.0, 30.0]), torch.tensor([0.5, 1.0, -30.0, 0.0])
    position = torch.tensor([0, 1, 2, 0])
    expected = -torch.log(1 / (1 + torch.exp(negative - positive[position]))).mean()
    torch.testing.assert_close(pairwise_loss(positive, negative, position), expected)


def test_gradient_of_the_loss_is_the_stated_one():
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(n, generator=generator, dtype=torch.float64) * 5 for n in (4, 9))
    position = torch.randint(4, (9,), generator=generator)
    positive.requires_grad_()
    negative.requires_grad_()
    pairwise_loss(positive, negative, position).backward()
    p = torch.sigmoid(negative - positive[position]).detach() / 9
    torch.testing.assert_close(negative.grad, p)
    torch.testing.assert_close(positive.grad, torch.zeros_like(positive).index_add_(0, position, -p))


def test_nothing_to_compare_costs_nothing():
    scores = torch.randn(2, 3, requires_grad=True)
    loss = packed_loss(SequenceClassifierOutput(logits=scores), torch.full((2, 3), NO_PAIR), num_items_in_batch=7)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(scores.grad, torch.zeros(2, 3))
    assert pack([None])["labels"].tolist() == [[NO_PAIR]]
