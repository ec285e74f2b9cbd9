"""GGUF files: what stands in them, read back by gguf and computed by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
)

import tutelage
from families import make_any_student
from helpers import make_student, redraw
from tutelage.errors import ExportError, OutputExistsError
from tutelage.exporters._layers import quantized_layers, twin
from tutelage.scheme import Scheme

gguf = pytest.importorskip("gguf")

WIDTH, HEADS, KV_HEADS, INNER, VOCAB = 256, 4, 2, 512, 300
HALF = WIDTH // HEADS // 2
ENCODINGS = ("tq2_0", "tq1_0")


def llama(cls: Any = LlamaForCausalLM, preset: str = "ternary-a8", **settings: Any) -> Any:
    shape = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": INNER}
    shape |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    shape |= {"num_hidden_layers": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}
    model = cls(LlamaConfig(**(shape | settings)))
    redraw(model)
    return tutelage.prepare(model.eval(), Scheme.preset(preset))


def bert(cls: Any = BertForSequenceClassification, preset: str = "ternary-a8", **more: Any) -> Any:
    shape = {"vocab_size": 40, "hidden_size": WIDTH, "intermediate_size": INNER, "num_labels": 3}
    shape |= {"num_attention_heads": HEADS, "num_hidden_layers": 2, "max_position_embeddings": 64}
    model = cls(BertConfig(**(shape | more)))
    redraw(model)
    return tutelage.prepare(model.eval(), Scheme.preset(preset))


def byte_level(*steps: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox is quicker than the others"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "##es", "jump", "##ed"]


def word_piece(**settings: Any) -> BertTokenizer:
    return BertTokenizer(vocab={word: index for index, word in enumerate(PIECES)}, **settings)


class Read:
    """What stands in a file."""

    def __init__(self, file: Path) -> None:
        reader = gguf.GGUFReader(file)
        self.kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {
            tensor.name: torch.from_numpy(
                gguf.quants.dequantize(tensor.data.copy(), tensor.tensor_type)
            ).float()
            for tensor in reader.tensors
        }
        self.fields = {name: field.contents() for name, field in reader.fields.items()}


def write(student: Any, file: Path, **options: Any) -> Read:
    assert tutelage.export(student, file, format="gguf", **options) == file
    return Read(file)


def rounded(student: Any) -> dict[str, Tensor]:
    """The weights by module name, with scales in half precision, by the definition."""
    return {
        name: layer.codes.float() * layer.scale.half().float()
        for name, layer in quantized_layers(student).items()
    }


def unturned(rows: Tensor) -> Tensor:
    """Puts the rows of a query or key projection back into the order of transformers."""
    made = torch.empty_like(rows)
    for head in range(len(rows) // (2 * HALF)):
        for index in range(HALF):
            first = head * 2 * HALF
            made[first + index] = rows[first + 2 * index]
            made[first + HALF + index] = rows[first + 2 * index + 1]
    return made


LLAMA_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("preset", ["ternary-a8", "binary-a8"])
def test_llama_tensors_are_codes_times_rounded_scales(
    preset: str, encoding: str, tmp_path: Path
) -> None:
    student = llama(preset=preset)
    read = write(student, tmp_path / "m.gguf", encoding=encoding)
    want = rounded(student)
    assert torch.equal(read.tensors["token_embd.weight"], want["model.embed_tokens"])
    assert "output.weight" not in read.tensors  # tied
    for block in range(2):
        for name, target in LLAMA_NAMES.items():
            got = read.tensors[f"blk.{block}.{target}.weight"]
            got = unturned(got) if target in ("attn_q", "attn_k") else got
            assert torch.equal(got, want[f"model.layers.{block}.{name}"])
            assert read.kinds[f"blk.{block}.{target}.weight"] == encoding.upper()
    for layer in quantized_layers(student).values():
        error = (want[layer.name] - layer.values).abs()
        assert bool((error <= layer.values.abs() * 2**-11).all())
    plain = student.state_dict()
    for target, name in (
        ("output_norm.weight", "model.norm.weight"),
        ("blk.1.attn_norm.weight", "model.layers.1.input_layernorm.weight"),
        ("blk.1.ffn_norm.weight", "model.layers.1.post_attention_layernorm.weight"),
    ):
        assert torch.equal(read.tensors[target], plain[name])
        assert read.kinds[target] == "F32"
    assert len(read.tensors) == 2 + 2 * (len(LLAMA_NAMES) + 2)
    assert (tmp_path / "m.gguf").stat().st_size < 420_000  # of 5 million in float32


def by_hand(read: Read, ids: Tensor) -> Tensor:
    """A Llama computed from a file, rotary positions over neighbouring rows."""
    t, fields = read.tensors, read.fields
    epsilon = fields["llama.attention.layer_norm_rms_epsilon"]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight

    def turned(x: Tensor) -> Tensor:
        made = torch.empty_like(x)
        for position in range(len(x)):
            for pair in range(HALF):
                angle = position * fields["llama.rope.freq_base"] ** (-pair / HALF)
                sin, cos = torch.tensor(angle).sin(), torch.tensor(angle).cos()
                one, other = x[position, :, 2 * pair], x[position, :, 2 * pair + 1]
                made[position, :, 2 * pair] = one * cos - other * sin
                made[position, :, 2 * pair + 1] = one * sin + other * cos
        return made

    x = t["token_embd.weight"][ids]
    mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    for block in range(fields["llama.block_count"]):
        w = {name: t[f"blk.{block}.{name}.weight"] for name in (*LLAMA_NAMES.values(), "ffn_norm")}
        h = norm(x, t[f"blk.{block}.attn_norm.weight"])
        heads, shared = (
            fields["llama.attention.head_count"],
            fields["llama.attention.head_count_kv"],
        )
        query = turned((h @ w["attn_q"].T).unflatten(-1, (heads, -1)))
        key = turned((h @ w["attn_k"].T).unflatten(-1, (shared, -1)))
        value = (h @ w["attn_v"].T).unflatten(-1, (shared, -1))
        context = []
        for head in range(heads):
            group = head // (heads // shared)
            scores = query[:, head] @ key[:, group].T * (2 * HALF) ** -0.5 + mask
            context.append(scores.softmax(-1) @ value[:, group])
        x = x + torch.cat(context, -1) @ w["attn_output"].T
        h = norm(x, w["ffn_norm"])
        gate = torch.nn.functional.silu(h @ w["ffn_gate"].T)
        x = x + (gate * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
    return norm(x, t["output_norm.weight"]) @ t.get("output.weight", t["token_embd.weight"]).T


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_computed_from_the_file_is_the_student(tied: bool, tmp_path: Path) -> None:
    student = llama(tie_word_embeddings=tied)
    read = write(student, tmp_path / "m.gguf")
    assert ("output.weight" in read.tensors) is not tied
    ids = torch.arange(3, 12)
    with torch.no_grad():
        want = twin(student)(ids[None]).logits[0]
        trained = student(ids[None]).logits[0]
    got = by_hand(read, ids)
    torch.testing.assert_close(got, want, atol=0.02, rtol=0.01)  # scales are rounded
    p, q = trained.log_softmax(-1), got.log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 0.01


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_transformers_reads_the_same_model_and_tokenizer(encoding: str, tmp_path: Path) -> None:
    student, tokenizer = llama(), byte_level()
    write(student, tmp_path / "m.gguf", processor=tokenizer, encoding=encoding)
    model, report = LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    for name, values in rounded(student).items():
        assert torch.equal(model.get_submodule(name).weight, values)
    made = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "the quick fox is other than 12 foxes"
    assert made(text).input_ids == tokenizer(text).input_ids


def test_settings_of_a_llama(tmp_path: Path) -> None:
    fields = write(llama(rms_norm_eps=1e-5), tmp_path / "m.gguf").fields
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_TQ2_0
    assert fields["llama.context_length"] == 64
    assert fields["llama.embedding_length"] == WIDTH
    assert fields["llama.feed_forward_length"] == INNER
    assert fields["llama.rope.dimension_count"] == 2 * HALF
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert fields["llama.vocab_size"] == VOCAB
    assert fields["tokenizer.ggml.model"] == "none"


def test_a_llama_without_a_head_has_the_same_names(tmp_path: Path) -> None:
    with_head = write(llama(), tmp_path / "a.gguf")
    without = write(llama(LlamaModel), tmp_path / "b.gguf")
    assert with_head.kinds == without.kinds


BERT_NAMES = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
}


def test_bert_tensors_and_head(tmp_path: Path) -> None:
    student = bert()
    read = write(student, tmp_path / "m.gguf", processor=word_piece())
    want, plain = rounded(student), student.state_dict()
    for block in range(2):
        for name, target in BERT_NAMES.items():
            got = read.tensors[f"blk.{block}.{target}.weight"]
            assert torch.equal(got, want[f"bert.encoder.layer.{block}.{name}"])
            bias = plain[f"bert.encoder.layer.{block}.{name}.bias"]
            assert torch.equal(read.tensors[f"blk.{block}.{target}.bias"], bias)
    assert torch.equal(read.tensors["cls.weight"], want["bert.pooler.dense"])
    assert torch.equal(read.tensors["cls.output.weight"], plain["classifier.weight"])
    positions = plain["bert.embeddings.position_embeddings.weight"]
    assert torch.equal(read.tensors["position_embd.weight"], positions)
    assert read.fields["bert.pooling_type"] == gguf.PoolingType.RANK
    assert read.fields["bert.attention.causal"] is False
    assert read.fields["bert.classifier.output_labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert len(read.tensors) == len(plain) - count_of_quantizers(student)


def count_of_quantizers(student: Any) -> int:
    return sum("quantizer" in name for name in student.state_dict())


def test_a_bert_without_a_head_has_no_pooler(tmp_path: Path) -> None:
    read = write(bert(BertModel), tmp_path / "m.gguf")
    assert not any(name.startswith("cls") for name in read.tensors)
    assert read.fields["bert.pooling_type"] == gguf.PoolingType.NONE


def test_a_byte_level_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_level()
    fields = write(llama(), tmp_path / "m.gguf", processor=tokenizer).fields
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == VOCAB
    for token, index in tokenizer.get_vocab().items():
        assert tokens[index] == token
    assert tokens[-1] == f"[PAD{VOCAB - 1}]"
    assert kinds[0] == kinds[1] == gguf.TokenType.CONTROL
    assert kinds[5] == gguf.TokenType.NORMAL
    assert kinds[-1] == gguf.TokenType.UNUSED
    assert "t h" in fields["tokenizer.ggml.merges"]
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.bos_token_id"] == 0
    assert fields["tokenizer.ggml.eos_token_id"] == 1
    assert fields["tokenizer.ggml.add_bos_token"] is False


def test_how_text_is_cut_is_recognized_or_asked_for(tmp_path: Path) -> None:
    student = llama()
    digits = byte_level(pre_tokenizers.Digits(individual_digits=True))
    fields = write(student, tmp_path / "a.gguf", processor=digits).fields
    assert fields["tokenizer.ggml.pre"] == "smollm"
    odd = byte_level(pre_tokenizers.Punctuation())
    with pytest.raises(ExportError, match="not recognized; pass pre_tokenizer"):
        tutelage.export(student, tmp_path / "b.gguf", format="gguf", processor=odd)
    made = write(student, tmp_path / "b.gguf", processor=odd, pre_tokenizer="falcon")
    assert made.fields["tokenizer.ggml.pre"] == "falcon"


def test_a_word_piece_tokenizer(tmp_path: Path) -> None:
    fields = write(bert(), tmp_path / "m.gguf", processor=word_piece()).fields
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens[:5] == PIECES[:5]
    assert tokens[5:10] == ["\u2581the", "\u2581fox", "es", "\u2581jump", "ed"]
    assert fields["tokenizer.ggml.model"] == "bert"
    assert fields["tokenizer.ggml.bos_token_id"] == 2
    assert fields["tokenizer.ggml.seperator_token_id"] == 3
    assert fields["tokenizer.ggml.padding_token_id"] == 0
    assert fields["tokenizer.ggml.token_type_count"] == 2


def refused(student: Any, file: Path, match: str, **options: Any) -> None:
    with pytest.raises(ExportError, match=match):
        tutelage.export(student, file, format="gguf", **options)
    assert not list(file.parent.iterdir())


def test_what_has_no_place_there_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    narrow = r"rows of 'model\.embed_tokens' are 128 weights long.* of 256; export to 'openvino'"
    refused(llama(hidden_size=128, head_dim=64), file, narrow)
    refused(make_any_student("gpt2"), file, "no GGUF layout for GPT2LMHeadModel")
    refused(bert(BertForMaskedLM), file, "no GGUF layout for BertForMaskedLM")
    refused(llama(preset="w2-a8"), file, "codes from -3 to 3.*another scheme")
    refused(bert(hidden_act="relu"), file, "with activation 'gelu' only")
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    refused(llama(rope_parameters=linear), file, "with unscaled rotary positions only")
    refused(llama(), file, "encoding is 'q4_0'", encoding="q4_0")


@pytest.mark.parametrize("factor", [1e6, 1e-5])
def test_scales_outside_half_precision_are_refused(factor: float, tmp_path: Path) -> None:
    student = llama()
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight.mul_(factor)
    what = r"scales of 'model\.layers\.0\.mlp\.up_proj', up to .*, are outside half precision"
    refused(student, tmp_path / "m.gguf", what)


def test_tokenizers_of_other_kinds_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    refused(bert(), file, "is of the kind BPE, not WordPiece", processor=byte_level())
    cased = word_piece(do_lower_case=False)
    refused(bert(), file, "tells upper from lower case", processor=cased)
    refused(llama(vocab_size=260), file, "the model has 260 tokens", processor=byte_level())


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    student, file = llama(), tmp_path / "m.gguf"
    file.write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match="pass overwrite=True"):
        tutelage.export(student, file, format="gguf")
    assert file.read_bytes() == b"mine"
    write(student, file, overwrite=True)
    with pytest.raises(OutputExistsError, match="name a file"):
        tutelage.export(student, tmp_path, format="gguf", overwrite=True)


def test_without_gguf_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ExportError, match=r"pip install 'tutelage\[gguf\]'"):
        tutelage.export(make_student(), tmp_path / "m.gguf", format="gguf")
