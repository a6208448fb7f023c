"""What is measured, against the same computed one example at a time without padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    T5Config,
    T5ForConditionalGeneration,
)

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel
from fastprefix.tasks import (
    AnsweredQuestion,
    Encoding,
    LabelledText,
    WrittenText,
    evaluate,
    find_answers,
    get_task,
    mean_loss,
    predict_classes,
    write,
)
from fastprefix_testing.tokenizers import byte_tokenizer

TEXTS = ["so late again", "a", "thank you all, it was lovely", "we are", "hm, well"]
LABELLED = [LabelledText(text, None, i % 3) for i, text in enumerate(TEXTS)]
WRITTEN = [WrittenText(f"name: {text}", (text, text[::-1])) for text in TEXTS]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(
        bos=True, bos_token="<bos>", cls_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


@pytest.fixture(scope="module")
def causal(tokenizer):
    model = tiny.build("llama", vocab_size=len(tokenizer), initializer_range=0.6)
    return PrefixTuningModel(model, PrefixConfig(num_virtual_tokens=3))


@pytest.fixture(scope="module")
def seq2seq(tokenizer):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2,
        eos_token_id=1, pad_token_id=2, decoder_start_token_id=2, tie_word_embeddings=False,
        initializer_factor=4.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def log_probability(model, tokenizer, kind, read, target):
    """Of the target's tokens behind what is read, and how many they are."""
    if kind == "CAUSAL_LM":
        ids = torch.tensor([[0, *tokenizer(read, add_special_tokens=False)["input_ids"]]])
        behind = torch.tensor([[*tokenizer(target, add_special_tokens=False)["input_ids"], 1]])
        logits = model(input_ids=torch.cat([ids, behind], 1)).logits[0, ids.shape[1] - 1 : -1]
    else:
        ids = torch.tensor([tokenizer(read)["input_ids"]])
        behind = torch.tensor([tokenizer(target)["input_ids"]])
        start = torch.tensor([[2, *behind[0, :-1].tolist()]])
        logits = model(input_ids=ids, decoder_input_ids=start).logits[0]
    each = logits.log_softmax(-1)[torch.arange(behind.shape[1]), behind[0]]
    return each.sum(), behind.shape[1]


@pytest.fixture(params=["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def language_model(request, causal, seq2seq):
    return request.param, causal if request.param == "CAUSAL_LM" else seq2seq


@torch.no_grad()
def test_loss_of_what_is_written(tokenizer, language_model):
    kind, model = language_model
    encoding = Encoding("descriptions", tokenizer, kind, 200)
    each = [
        log_probability(model, tokenizer, kind, f"{one.source}\n", one.targets[0])
        for one in WRITTEN
    ]
    wanted = -sum(total for total, _ in each) / sum(count for _, count in each)
    assert mean_loss(model, encoding, WRITTEN, batch_size=2) == pytest.approx(float(wanted), 1e-5)


@torch.no_grad()
def test_classes_by_their_words(tokenizer, language_model):
    kind, model = language_model
    # words of one length: a random model prefers short ones, whatever the text
    letters = tuple("abcdefghij")
    task = replace(get_task("tweets"), labels=letters, words=letters)
    encoding = Encoding(task, tokenizer, kind, 200)
    wanted = [
        max(
            range(10),
            key=lambda label: log_probability(
                model, tokenizer, kind, f"{one.text}\nSentiment:", task.answer(label)
            )[0],
        )
        for one in LABELLED
    ]
    assert predict_classes(model, encoding, LABELLED, batch_size=2) == wanted
    assert len(set(wanted)) > 1


@torch.no_grad()
def test_what_is_written(tokenizer, language_model):
    kind, model = language_model
    encoding = Encoding("descriptions", tokenizer, kind, 200, 12)
    wanted = []
    for one in WRITTEN:
        read = f"{one.source}\n"
        ids = tokenizer(read, add_special_tokens=kind != "CAUSAL_LM")["input_ids"]
        ids = torch.tensor([[0, *ids] if kind == "CAUSAL_LM" else ids])
        new = model.generate(
            input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=2, eos_token_id=1
        )[0]
        new = new[ids.shape[1] :] if kind == "CAUSAL_LM" else new
        wanted.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    assert write(model, encoding, WRITTEN, batch_size=2) == wanted
    assert any(wanted)
    scores = evaluate(model, encoding, WRITTEN, batch_size=3)
    assert set(scores) == {"loss", "perplexity", "bleu", "rouge_l", "chrf"}


@torch.no_grad()
def test_spans(tokenizer):
    """The best allowed span of all pieces of a passage, and the loss of each piece."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=2, initializer_range=0.5,
    )  # fmt: skip
    model = BertForQuestionAnswering(config).eval()
    passage = "They live in a red house by the sea. It is windy there."
    examples = [
        AnsweredQuestion("1", "Where?", passage, ("a red house",), (13,)),
        AnsweredQuestion("2", "What?", "The sea.", ("sea",), (4,)),
    ]
    encoding = Encoding("squad", tokenizer, "QUESTION_ANS", 40, stride=8)
    answers, losses = [], []
    for example in examples:
        best = (-float("inf"), "")
        for piece in encoding.pieces(example):
            ids = torch.tensor([piece.inputs["input_ids"]])
            types = piece.inputs.get("token_type_ids")
            out = model(ids, token_type_ids=None if types is None else torch.tensor([types]))
            item = piece.training_item()
            losses.append(
                F.cross_entropy(out.start_logits, torch.tensor([item["start_positions"]])) / 2
                + F.cross_entropy(out.end_logits, torch.tensor([item["end_positions"]])) / 2
            )
            for i, begin in enumerate(piece.offsets):
                for j, end in enumerate(piece.offsets[i : i + 30], start=i):
                    if begin and end:
                        score = float(out.start_logits[0, i] + out.end_logits[0, j])
                        best = max(best, (score, example.context[begin[0] : end[1]]))
        answers.append(best[1])
    assert len(losses) > 3
    assert find_answers(model, encoding, examples, batch_size=2) == answers
    assert mean_loss(model, encoding, examples, batch_size=2) == pytest.approx(
        float(sum(losses) / len(losses)), 1e-5
    )
    with pytest.raises(ValueError, match=r"max_length: got 40, .*40 tokens of question 3 leaves"):
        list(encoding.items([replace(examples[0], id="3", question="x" * 40)]))
    items = list(encoding.items(examples))
    found = [tokenizer.decode(x["input_ids"][x["start_positions"] : x["end_positions"] + 1])
             for x in items]  # fmt: skip
    assert set(found) == {"a red house", "sea", "<bos>"}


def test_a_model_is_left_in_its_mode(tokenizer, causal):
    encoding = Encoding("descriptions", tokenizer, "CAUSAL_LM", 200, 2)
    causal.train()
    mean_loss(causal, encoding, WRITTEN)
    write(causal, encoding, WRITTEN[:1])
    assert causal.training
    causal.eval()
    with pytest.raises(ValueError, match="examples: got none"):
        evaluate(causal, encoding, [])
    with pytest.raises(ValueError, match="batch_size: got 0"):
        evaluate(causal, encoding, WRITTEN, 0)
