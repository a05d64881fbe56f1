"""Training tokenizers."""

import subprocess
import sys

import pytest
from tokenizers import Tokenizer

from kernelm_contracts.data import Train
from kernelm_data.corpus.training import KINDS, train

TEXTS = [f"Words # {n} of {n * 7919 % 1000}, with the café, 中文 and {chr(945 + n % 24)}{chr(97 + n % 26)}ing." for n in range(400)]
OTHER_PROCESS = """
import hashlib, sys
from kernelm_contracts.data import Train
from kernelm_data.corpus.training import train
from test_corpus_tokenizing import TEXTS
print(hashlib.sha256(train(Train(sys.argv[1], 400), lambda: TEXTS).to_str().encode()).hexdigest())
"""


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_texts_give_the_same_tokenizer(kind, monkeypatch, pytestconfig):
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath / "plugins/data/tests"))
    found = {train(Train(kind, 400), lambda: TEXTS).to_str() for _ in range(4)}
    assert len(found) == 1
    command = [sys.executable, "-c", OTHER_PROCESS, kind]
    assert len({subprocess.run(command, check=True, capture_output=True).stdout for _ in range(2)}) == 1


def test_wordpiece_is_what_berts_tokenizer_is():
    tokenizer: Tokenizer = train(Train("wordpiece", 400), lambda: TEXTS)
    assert tokenizer.get_vocab_size() == 400
    assert [tokenizer.id_to_token(i) for i in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer.encode("Words of, with 中文").tokens == ["[CLS]", "words", "of", ",", "with", "中", "文", "[SEP]"]
    assert tokenizer.encode("[MASK] ##a").tokens[1:3] == ["[MASK]", "#"]  # a character within words is no special token
    assert not tokenizer.get_added_tokens_decoder().keys() - set(range(5))
    assert tokenizer.decode(tokenizer.encode("words with the café").ids) == "words with the cafe"


CHINESE = [f"第{n}章　北京大学的学生在图书馆看书。\n天气很好\uff0c我们去公园散步。Chapter {n} is over." for n in range(200)]


def test_characters_merge_to_words_and_what_was_never_seen_is_unknown():
    tokenizer = train(Train("bpe-characters", 400), lambda: CHINESE)
    vocabulary = tokenizer.get_vocab()
    assert [tokenizer.id_to_token(i) for i in range(2)] == ["<|endoftext|>", "[UNK]"]
    assert {"图书馆", "▁is", "。", "\n"} <= vocabulary.keys()
    for text in (*CHINESE[:5], "学生\n\n在公园 Chapter  7"):
        encoding = tokenizer.encode(text)
        assert tokenizer.decode(encoding.ids) == text
        assert "[UNK]" not in encoding.tokens
    assert max(map(len, vocabulary.keys() - {"<|endoftext|>"})) <= 16
    found = tokenizer.encode("北京龘龖看书")
    assert found.tokens[0].startswith("北")
    assert found.tokens.count("[UNK]") == 1  # a run of unknown characters is one
    assert found.ids[found.tokens.index("[UNK]")] == vocabulary["[UNK]"]


def test_rare_characters_are_left_out_of_a_small_vocabulary():
    rare = [chr(0x4E00 + n) * 2 for n in range(1_000)]  # all equally frequent: those first that Unicode has first
    tokenizer = train(Train("bpe-characters", 300), lambda: [*CHINESE, *rare])
    assert tokenizer.get_vocab_size() <= 300
    assert len([token for token in tokenizer.get_vocab() if len(token) == 1]) <= 150
    assert tokenizer.encode(chr(0x4E00)).tokens != ["[UNK]"]
    assert tokenizer.encode(chr(0x4E00 + 999)).tokens == ["[UNK]"]


def test_byte_level_bpe_knows_every_character():
    tokenizer = train(Train("bpe", 400), lambda: CHINESE)
    assert tokenizer.decode(tokenizer.encode("龘 😀 Ж").ids) == "龘 😀 Ж"
