"""A text that is encoded in parts has the ids of the text encoded at once, whatever the tokenizer adds or merges."""

import io
import random

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_emoe.data import corpus, encoder, input_files, joints

WORDS = "the router of a layer picks experts, and its weights 1234567 Größe naïve 日本語 😀 def f(x): return".split()


def sample(seed: int) -> str:
    """Prose, code, blank lines, long lines and text without blanks, in one."""
    draw, lines = random.Random(seed), []
    for _ in range(120):
        words = [draw.choice(WORDS) for _ in range(draw.choice((0, 1, 3, 9, 60)))]
        lines.append(draw.choice(("", "", "    ", "\t", "  \n\n  ")) + draw.choice((" ", "  ", "")).join(words))
    return draw.choice(("\n", "\r\n", "\n\n\n")).join(lines)


def byte_level(*special: str, template: str) -> Tokenizer:
    """As Llama 3 and DeepSeek have it: bytes, merged within words, and special tokens around the text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained_on(made, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=list(special)))
    return with_template(made, template, special)


def metaspace(template: str) -> Tokenizer:
    """As Llama 2 has it in tokenizers: a blank in front of the text, no words, bytes for what is unknown."""
    spell = [f"<0x{byte:02X}>" for byte in range(256)]
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>", *spell]
    trained_on(made, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    return with_template(made, template, ("<s>", "</s>"))


def word_pieces() -> Tokenizer:
    """As BERT has it: lower case, no line ends, [CLS] and [SEP]."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trained_on(made, trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]", "[CLS]", "[SEP]"]))
    return with_template(made, "[CLS] $A [SEP]", ("[CLS]", "[SEP]"))


def trained_on(made: Tokenizer, trainer: trainers.Trainer) -> None:
    trainer.show_progress = False
    made.train_from_iterator([sample(1)], trainer)


def with_template(made: Tokenizer, template: str, special: tuple[str, ...]) -> Tokenizer:
    tokens = [(token, made.token_to_id(token)) for token in special if token in template]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    return made


def pieces(**settings) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    lines = iter(line for line in sample(1).splitlines() if line.strip())
    trainer = {"sentence_iterator": lines, "model_writer": model, "minloglevel": 2, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(**trainer, **settings)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


MAKERS = {
    "no special tokens": lambda: byte_level(template="$A"),
    "<s>": lambda: byte_level("<s>", "</s>", template="<s> $A"),
    "<s> and </s>": lambda: byte_level("<s>", "</s>", template="<s> $A </s>"),
    "</s>": lambda: byte_level("<s>", "</s>", template="$A </s>"),
    "</s> twice": lambda: byte_level("<s>", "</s>", template="</s> $A </s> </s>"),
    "a blank in front": lambda: metaspace("<s> $A"),
    "word pieces": word_pieces,
    "SentencePiece BPE": lambda: pieces(model_type="bpe", vocab_size=400, byte_fallback=True),
    "SentencePiece unigram": lambda: pieces(model_type="unigram", vocab_size=200),
    "SentencePiece as Llama's": lambda: pieces(
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    ),
}


def encode_with(tokenizer):
    if isinstance(tokenizer, Tokenizer):
        return lambda text: tokenizer.encode(text).ids
    return lambda text: tokenizer.encode(text)


class AsMegatrons:
    """What an Encoder asks of a tokenizer."""

    eod, vocab_size = 0, 10_000

    def __init__(self, tokenize) -> None:
        self.tokenize = tokenize


@pytest.mark.parametrize("name", MAKERS)
def test_cutting_does_not_show(name, tmp_path, monkeypatch):
    tokenize = encode_with(MAKERS[name]())
    monkeypatch.setattr(corpus, "PIECE_BYTES", 400)
    monkeypatch.setattr(corpus, "MAX_LINE_SEARCH", 40)  # lines are longer
    encode = encoder.Encoder(AsMegatrons(tokenize), "int64", ("text",), "strict", append_eod=False, holdout=0)
    for seed in range(2, 12):
        text = sample(seed)
        (tmp_path / "a.txt").write_bytes(text.encode())
        cut = list(corpus.cut(input_files.look(f"{tmp_path}/a.txt", ()), ()))
        assert len(cut) > 10 and any(not piece.data.endswith(b"\n") for piece in cut[:-1])
        parts = [encode.encode([piece])["text", False] for piece in cut]
        assert [int(token) for part in parts for ids in part.ids for token in ids] == tokenize(text)
        assert [end for part in parts for end in part.ends] == [False] * (len(cut) - 1) + [True]


def numbers(text: str) -> list[int]:
    """As Megatron's NullTokenizer."""
    return [int(word) for word in text.split(" ")]


def test_a_number_is_not_cut():
    left, right = "1 22 333 44", "44 55 6"
    assert joints.ids_behind(numbers) == 0
    assert joints.place_to_cut(numbers, 0, left, right) == 2
    assert joints.encode_part(numbers, left, None, (left, right)) == [1, 22, 333, 4444]
    assert joints.encode_part(numbers, right, (left, right), None) == [55, 6]


def length(text: str) -> list[int]:
    return [len(text)] if text else []


def reversed_codes(text: str) -> list[int]:
    return [*map(ord, reversed(text)), 1]


def first_last(text: str) -> list[int]:
    return [*map(ord, text), len(text)]


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (length, r"no place to cut behind 'aaaa' that changes no ids: split the file"),
        (reversed_codes, r"no place to cut behind 'aaaa'"),
        (first_last, r"what the tokenizer puts behind a text differs: split the file"),
    ],
)
def test_ids_that_depend_on_the_whole_text_are_an_error(encode, message):
    with pytest.raises(ValueError, match=message):
        joints.encode_part(encode, "aaaa", None, ("aaaa", "bbbb"))
