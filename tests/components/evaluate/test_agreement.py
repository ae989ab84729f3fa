"""Other programs score the same text alike: the Hugging Face recipe, lm-evaluation-harness."""

from pathlib import Path

import pytest
import torch

from nudge.components.common.core.progress import progress
from nudge.components.common.models.language_model import load_model, load_tokenizer
from nudge.components.evaluate.perplexity import score

TEXT = "The Eiffel Tower is located in Paris, on the Champ de Mars, and was built in 1889. " * 6
FIRST = 0


def ours(folder: Path, texts: list[str], window: int, stride: int) -> list[float]:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    with progress("test") as bar:
        scores = score(
            model, tokenizer, texts, first_token=FIRST, window=window, stride=stride, bar=bar
        )
    return [each.nats for each in scores]


def test_the_hugging_face_stride_recipe_agrees(tiny_model: Path) -> None:
    """The unchanged loop of https://huggingface.co/docs/transformers/perplexity, on a text whose
    last window is full (that loop gives a shorter window less context)."""
    window, stride = 32, 12
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    while True:
        text = tokenizer.decode(ids)
        length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if length > window and (length - window) % stride == 0:
            break
        ids = ids[:-1]
    encodings = torch.tensor([[FIRST, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    max_length, seq_len = window + 1, encodings.size(1)
    nll_sum, prev_end_loc = 0.0, 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        input_ids = encodings[:, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            neg_log_likelihood = model(input_ids, labels=target_ids).loss
        num_valid_tokens = (target_ids != -100).sum().item()
        nll_sum += float(neg_log_likelihood) * (num_valid_tokens - int(begin_loc == 0))
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    assert ours(tiny_model, [text], window, stride)[0] == pytest.approx(nll_sum, rel=1e-4)


@pytest.mark.long
def test_lm_evaluation_harness_agrees(tiny_model: Path) -> None:
    """Its rolling log-likelihood, whose windows do not overlap."""
    pytest.importorskip("lm_eval", reason="pip install lm-eval (the extra tasks)")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    texts = [TEXT, "A short one.", TEXT[7:300], "x"]
    window = 32
    harness = HFLM(
        pretrained=load_model(tiny_model),
        tokenizer=load_tokenizer(tiny_model),
        max_length=window,
        prefix_token_id=FIRST,
        add_bos_token=False,
        batch_size=1,
    )
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=n)
        for n, text in enumerate(texts)
    ]
    theirs = [-value for value in harness.loglikelihood_rolling(requests, disable_tqdm=True)]
    assert ours(tiny_model, texts, window, window) == pytest.approx(theirs, rel=1e-4)
