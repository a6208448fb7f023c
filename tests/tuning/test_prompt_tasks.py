"""PromptTuningModel in classifiers, taggers and encoder-decoders, against each row alone."""

import pytest
import torch
from transformers import (
    BertForQuestionAnswering,
    BertForTokenClassification,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import fastprefix_testing.models as tiny
from fastprefix import PromptConfig, PromptTuningModel
from fastprefix_testing.prompts import CLOSE, P, alone, bert, rows, without


@pytest.fixture(params=["left", "right"])
def side(request):
    return request.param


def test_an_encoder_classifies_each_row_as_alone(side):
    tuned = PromptTuningModel(
        bert(), PromptConfig(num_virtual_tokens=P, task_type="SEQ_CLS", init_std=1.0)
    ).eval()
    ids, mask = tiny.batch(side=side)
    labels = torch.tensor([2, 0, 1])
    out = tuned(ids, attention_mask=mask, labels=labels, token_type_ids=torch.zeros_like(ids))
    prompt = tuned.export_embeddings()
    expected = torch.cat([alone(bert(), prompt, text).logits for text in rows(ids, mask)])
    torch.testing.assert_close(out.logits, expected, **CLOSE)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(expected, labels))


def test_a_causal_classifier_reads_the_last_real_token(side):
    def build():
        torch.manual_seed(0)
        config = tiny.build().config
        return LlamaForSequenceClassification(config).eval()

    tuned = PromptTuningModel(
        build(), PromptConfig(num_virtual_tokens=P, task_type="SEQ_CLS", init_std=1.0)
    ).eval()
    ids, mask = tiny.batch(side=side)
    got = tuned(ids, attention_mask=mask).logits
    prompt = tuned.export_embeddings()
    expected = torch.cat([alone(build(), prompt, text).logits for text in rows(ids, mask)])
    torch.testing.assert_close(got, expected, **CLOSE)


def test_tokens_are_labelled_as_alone(side):
    tuned = PromptTuningModel(
        bert(BertForTokenClassification),
        PromptConfig(num_virtual_tokens=P, task_type="TOKEN_CLS", init_std=1.0),
    ).eval()
    ids, mask = tiny.batch(side=side)
    labels = (ids % 3).masked_fill(mask == 0, -100)
    out = tuned(ids, attention_mask=mask, labels=labels)
    prompt, plain = tuned.export_embeddings(), bert(BertForTokenClassification)
    expected = torch.cat([without(alone(plain, prompt, t).logits) for t in rows(ids, mask)])
    torch.testing.assert_close(out.logits[mask.bool()], expected, **CLOSE)
    loss = torch.nn.functional.cross_entropy(expected, labels[mask.bool()])
    torch.testing.assert_close(out.loss, loss)


def test_answers_lie_in_the_text(side):
    tuned = PromptTuningModel(
        bert(BertForQuestionAnswering, num_labels=2),
        PromptConfig(num_virtual_tokens=P, task_type="QUESTION_ANS", init_std=1.0),
    ).eval()
    ids, mask = tiny.batch((7, 5), side)
    out = tuned(ids, attention_mask=mask)
    prompt, plain = tuned.export_embeddings(), bert(BertForQuestionAnswering, num_labels=2)
    for row, text in enumerate(rows(ids, mask)):
        expected = alone(plain, prompt, text)
        for name in ("start_logits", "end_logits"):
            got = out[name][row][mask[row].bool()]
            torch.testing.assert_close(got, without(expected[name]), **CLOSE)
    text, start, end = ids[:1], torch.tensor([1]), torch.tensor([4])
    out = tuned(text, attention_mask=mask[:1], start_positions=start, end_positions=end)
    expected = alone(plain, prompt, text, start_positions=start + P, end_positions=end + P)
    torch.testing.assert_close(out.loss, expected.loss)
    cut = tuned(
        torch.cat([text, text]),
        start_positions=torch.tensor([1, 40]),
        end_positions=torch.tensor([4, 40]),
    )
    torch.testing.assert_close(cut.loss, expected.loss)  # an answer cut off counts for nothing


def t5():
    config = T5Config(
        vocab_size=101,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=None,
        initializer_factor=3.0,
    )
    torch.manual_seed(0)
    return T5ForConditionalGeneration(config).double().eval()


def test_an_encoder_decoder_gets_the_prompt_in_its_encoder(side):
    tuned = PromptTuningModel(
        t5(), PromptConfig(num_virtual_tokens=P, task_type="SEQ_2_SEQ_LM", init_std=10.0)
    ).eval()
    ids, mask = tiny.batch(side=side)
    labels = tiny.batch((4, 4, 4))[0]
    out = tuned(ids, attention_mask=mask, labels=labels)
    new = tuned.generate(ids, attention_mask=mask, max_new_tokens=5)
    prompt, plain = tuned.export_embeddings(), t5()
    for row, text in enumerate(rows(ids, mask)):
        expected = alone(plain, prompt, text, labels=labels[row : row + 1])
        torch.testing.assert_close(out.logits[row], expected.logits[0])
        fed = torch.cat([prompt[None].double(), plain.get_input_embeddings()(text)], dim=1)
        assert torch.equal(new[row], plain.generate(inputs_embeds=fed, max_new_tokens=5)[0])
