"""Tokenizers: bytes, a JSON file that is trained here, and a folder made from it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from secateur.errors import PlanError
from secateur.text import NextToken
from secateur.text.tokenizer import load_tokenizer
from tests.text.llama import llama, loss_alone

TEXT = b"the pear tree and the plum tree"


@pytest.fixture(scope="module")
def pipeline() -> Tokenizer:
    """A byte-pair encoding with a token that begins a text."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>"]
    trained.train_from_iterator(
        [TEXT.decode()] * 4, trainers.BpeTrainer(vocab_size=60, special_tokens=special)
    )
    trained.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return trained


@pytest.fixture(scope="module")
def file(pipeline: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its file, with settings for truncation and padding that do not count."""
    path = str(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    saved = Tokenizer.from_str(pipeline.to_str())
    saved.enable_truncation(3)
    saved.enable_padding(length=50)
    saved.save(path)
    return path


@pytest.fixture(scope="module")
def folder(pipeline: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("folder"))
    PreTrainedTokenizerFast(
        tokenizer_object=pipeline, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    return path


def test_bytes() -> None:
    tokenizer, end = load_tokenizer("bytes", False)
    assert tokenizer.encode(b"\xffa", True) == [255, 97]
    assert (tokenizer.size, end) == (256, None)
    tokenizer, end = load_tokenizer("bytes", True)
    assert (tokenizer.size, end) == (257, 256)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_files_and_folders_encode_alike(
    kind: str, pipeline: Tokenizer, request: pytest.FixtureRequest
) -> None:
    tokenizer, end = load_tokenizer(request.getfixturevalue(kind), "</s>")
    ids = tokenizer.encode(TEXT, True)
    assert ids == pipeline.encode(TEXT.decode()).ids
    assert ids[0] == 1
    assert tokenizer.encode(TEXT, False) == ids[1:]
    assert "".join(pipeline.id_to_token(i) for i in ids[1:]) == TEXT.decode().replace(" ", "")
    assert tokenizer.size == pipeline.get_vocab_size()
    assert end == 2
    with pytest.raises(UnicodeDecodeError):
        tokenizer.encode(b"\xff", True)


def test_the_folder_names_its_end_token_and_the_file_does_not(file: str, folder: str) -> None:
    assert load_tokenizer(folder, True)[1] == 2
    with pytest.raises(PlanError, match="names no end token; give its name"):
        load_tokenizer(file, True)


def test_an_end_token_that_the_tokenizer_adds_itself_is_not_added_twice(
    pipeline: Tokenizer, tmp_path: Path
) -> None:
    ending = Tokenizer.from_str(pipeline.to_str())
    ending.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    path = str(tmp_path / "ending.json")
    ending.save(path)
    batch = NextToken(length=64, tokenizer=path, eos="</s>").collate([{"txt": TEXT}])
    assert batch["input_ids"][0].tolist() == ending.encode(TEXT.decode()).ids


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_prompt_and_its_completion_are_encoded_apart(
    kind: str, pipeline: Tokenizer, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(kind)
    model = llama(vocab_size=60)
    task = NextToken(length=64, text="json.answer", prompt="json.ask", tokenizer=path, eos="</s>")
    member = json.dumps({"ask": "the pear", "answer": "tree and"}).encode()
    batch = task.collate([{"json": member}])
    ask = pipeline.encode("the pear").ids
    answer = pipeline.encode("tree and", add_special_tokens=False).ids
    assert batch["input_ids"][0].tolist() == [*ask, *answer, 2]
    alone = loss_alone(model, [*ask, *answer, 2], prompt=len(ask))
    assert task.losses(model, batch).item() == pytest.approx(alone.item(), rel=1e-6)


def test_what_cannot_be_loaded_is_said_in_one_sentence(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {
        "gpt2": "the tokenizer gpt2 is neither a file nor a folder",
        str(broken): r"broken\.json cannot be read .* a JSON file that `tokenizers` saved",
        str(empty): "empty cannot be read .* save_pretrained of a tokenizer wrote",
    }
    for name, sentence in cases.items():
        with pytest.raises(PlanError, match=sentence) as raised:
            load_tokenizer(name, False)
        assert "\n" not in str(raised.value)
    with pytest.raises(PlanError, match="has no token <end>; correct `eos`"):
        load_tokenizer(file, "<end>")
    with pytest.raises(PlanError, match="bytes has no token </s>"):
        load_tokenizer("bytes", "</s>")
    for module, name in (("tokenizers", file), ("transformers", str(empty))):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(PlanError, match=r"pip install 'secateur\[huggingface\]'"):
                load_tokenizer(name, False)
