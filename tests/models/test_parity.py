"""The backbones against transformers' own classes, on random weights."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ModernBertModel, NomicBertModel
from transformers import ModernBertConfig as HfModernBertConfig
from transformers import NomicBertConfig as HfNomicBertConfig

from app.domain import DATASET_EMBEDDINGS, InputType
from app.models.kernels import Kernels
from app.models.layout import Layout
from app.models.loading import LoadedModel
from app.models.minilm import MiniLM
from app.models.modern_bert import ModernBert, ModernBertConfig
from app.models.nomic_bert import NomicBert, NomicBertConfig
from app.models.stages import SecondStage
from app.models.transformer import Transformer
from app.models.tuning import onednn
from tests.models.conftest import builtin_folder, embed, tokenized

LENGTHS = (23, 1, 9, 40)
CLOSE = 2e-5


KERNELS = [Kernels(), Kernels(attention="bmm")]
if onednn("float32", torch.float32):
    KERNELS += [Kernels(linear="onednn", attention="bmm"), Kernels(linear="onednn", attention="linear")]


def hidden_states(ours: Transformer, rows: Tensor, mask: Tensor) -> Tensor:
    """Our packed forward over padded rows (B, S, D): without the padding, all sequences in one forward."""
    layout = Layout.of([int(n) for n in mask.sum(dim=1)], torch.device("cpu"))
    hidden = torch.zeros_like(rows)
    hidden[mask] = ours(ours.enter(rows[mask], layout), layout)
    return hidden


def as_any(value: Any) -> Any:
    """transformers' types describe neither `eval` nor what its configurations take."""
    return value


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Weights with nothing at rest: norms are not ones, biases not zeros, attention is sharp."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.3 * noise + ("bias" not in name))
            else:
                parameter.copy_(noise * (1.0 if "embeddings" in name else 2.0 / parameter.shape[1] ** 0.5))


def batch(vocabulary: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Ids and mask of texts of LENGTHS, padded on the right with ids that mean something."""
    ids = torch.randint(0, vocabulary, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(max(LENGTHS))[None, :] < torch.tensor(LENGTHS)[:, None]


def assert_same(ours: Tensor, theirs: Tensor, mask: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs[mask].std() > 0.1
    worst = (ours - theirs)[mask].abs().max().item()
    assert worst < CLOSE * max(1.0, theirs[mask].abs().max().item()), worst


# --- NomicBERT -----------------------------------------------------------------------------------------------------


def nomic_pair(config: NomicBertConfig, kernels: Kernels) -> tuple[NomicBert, Any]:
    theirs: Any = NomicBertModel(
        HfNomicBertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            intermediate_size=(config.n_inner + 255) // 256 * 256,
            type_vocab_size=config.type_vocab_size,
            layer_norm_eps=config.layer_norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": config.rotary_emb_base},
        )
    )
    theirs.eval()
    ours = NomicBert(config).eval()
    randomize(ours)
    state = {}
    for key, value in ours.state_dict().items():
        renamed = key
        for old, new in (
            ("emb_ln.", "embeddings.LayerNorm."),
            ("encoder.layers.", "layers."),
            ("attn.out_proj", "self_attn.o_proj"),
            ("mlp.fc11", "mlp.up_proj"),
            ("mlp.fc12", "mlp.gate_proj"),
            ("mlp.fc2", "mlp.down_proj"),
            ("norm1", "post_attention_layernorm"),
            ("norm2", "post_mlp_layernorm"),
        ):
            renamed = renamed.replace(old, new)
        if "Wqkv" in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                state[renamed.replace("attn.Wqkv", f"self_attn.{name}_proj")] = part
        else:
            state[renamed] = value
    theirs.load_state_dict(state)
    ours.prepare(kernels)
    return ours, theirs


NOMIC = [
    NomicBertConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=1, n_inner=256, rotary_emb_base=1000.0),
    NomicBertConfig(vocab_size=61, n_embd=64, n_layer=3, n_head=4, n_inner=512, rotary_emb_base=1000.0),
    NomicBertConfig(vocab_size=61, n_embd=48, n_layer=2, n_head=6, n_inner=300, rotary_emb_base=50.0),
    NomicBertConfig(vocab_size=61, n_embd=64, n_layer=2, n_head=2, n_inner=256, layer_norm_epsilon=0.1),
]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("config", NOMIC)
def test_nomic_bert(config: NomicBertConfig, kernels: Kernels) -> None:
    ours, theirs = nomic_pair(config, kernels)
    ids, mask = batch(config.vocab_size)
    with torch.inference_mode():
        expected = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        assert_same(hidden_states(ours, ours.token_rows(ids), mask), expected, mask)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("config", NOMIC)
def test_nomic_bert_on_rows(config: NomicBertConfig, kernels: Kernels) -> None:
    """As the Hub's second stage runs it: rows in front of the text; transformers adds the token type to all of it."""
    ours, theirs = nomic_pair(config, kernels)
    ids, mask = batch(config.vocab_size)
    context = torch.randn(len(LENGTHS), 7, config.n_embd, generator=torch.Generator().manual_seed(2))
    rows = torch.cat((context, ours.text_rows(ids).detach()), dim=1)
    seen = torch.cat((mask.new_ones(len(LENGTHS), 7), mask), dim=1)
    with torch.inference_mode():
        expected = theirs(inputs_embeds=rows, attention_mask=seen.long()).last_hidden_state
        assert_same(hidden_states(ours, rows + ours.token_type, seen), expected, seen)


def test_nomic_bert_sizes_from_the_published_configuration() -> None:
    """The defaults are nomic-bert-2048's, which transformers' defaults are too."""
    theirs, ours = HfNomicBertConfig(), NomicBertConfig()
    assert (ours.vocab_size, ours.n_embd, ours.n_layer) == (30528, theirs.hidden_size, theirs.num_hidden_layers)
    assert (ours.n_head, ours.n_inner) == (theirs.num_attention_heads, theirs.intermediate_size)
    assert ours.layer_norm_epsilon == theirs.layer_norm_eps
    assert theirs.rope_parameters is not None
    assert ours.rotary_emb_base == theirs.rope_parameters["rope_theta"]


# --- ModernBERT ----------------------------------------------------------------------------------------------------


def modern_pair(config: ModernBertConfig, kernels: Kernels, attention: str = "sdpa") -> tuple[ModernBert, Any]:
    theirs: Any = ModernBertModel(
        as_any(HfModernBertConfig)(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            norm_eps=config.norm_eps,
            global_attn_every_n_layers=config.global_attn_every_n_layers,
            global_rope_theta=config.global_rope_theta,
            local_rope_theta=config.local_rope_theta,
            local_attention=config.local_attention,
            pad_token_id=0,
            bos_token_id=1,
            cls_token_id=1,
            eos_token_id=2,
            sep_token_id=2,
            attn_implementation=attention,
        )
    )
    theirs.eval()
    ours = ModernBert(config).eval()
    randomize(ours)
    theirs.load_state_dict(ours.state_dict())  # the key names are the same
    ours.prepare(kernels)
    return ours, theirs


def modern(**values: float) -> ModernBertConfig:
    small = {"vocab_size": 67, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 7}
    return ModernBertConfig.from_dict({**small, "num_attention_heads": 4, "local_attention": 8, **values})


MODERN = [
    modern(),
    modern(hidden_size=32, num_attention_heads=1, num_hidden_layers=2),
    modern(local_attention=2, intermediate_size=90),
    modern(local_attention=128),
    modern(global_attn_every_n_layers=2, num_hidden_layers=4),
    modern(global_rope_theta=300.0, local_rope_theta=20.0, norm_eps=0.1),
]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", MODERN)
def test_modern_bert(config: ModernBertConfig, attention: str, kernels: Kernels) -> None:
    ours, theirs = modern_pair(config, kernels, attention)
    ids, mask = batch(config.vocab_size)
    with torch.inference_mode():
        expected = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        assert_same(hidden_states(ours, ours.token_rows(ids), mask), expected, mask)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("config", MODERN)
def test_modern_bert_on_rows(config: ModernBertConfig, kernels: Kernels) -> None:
    """As the second stage runs it: the text is normed by the embeddings, and again with the rows in front of it."""
    ours, theirs = modern_pair(config, kernels)
    ids, mask = batch(config.vocab_size)
    context = 3.0 * torch.randn(len(LENGTHS), 7, config.hidden_size, generator=torch.Generator().manual_seed(2))
    seen = torch.cat((mask.new_ones(len(LENGTHS), 7), mask), dim=1)
    with torch.inference_mode():
        text = theirs.embeddings(input_ids=ids)
        assert_same(ours.text_rows(ids), text, mask)
        rows = torch.cat((context, text), dim=1)
        expected = theirs(inputs_embeds=rows, attention_mask=seen.long()).last_hidden_state
        assert_same(hidden_states(ours, rows, seen), expected, seen)


def test_modern_bert_sizes_from_the_published_configuration() -> None:
    theirs, ours = HfModernBertConfig(), ModernBertConfig()
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert (ours.norm_eps, ours.local_attention) == (theirs.norm_eps, theirs.local_attention)
    assert theirs.rope_parameters is not None
    assert ours.global_rope_theta == theirs.rope_parameters["full_attention"]["rope_theta"]
    assert ours.local_rope_theta == theirs.rope_parameters["sliding_attention"]["rope_theta"]
    assert theirs.layer_types is not None
    is_global = [block.attn.window is None for block in ModernBert(modern(num_hidden_layers=22)).blocks]
    assert is_global == [kind == "full_attention" for kind in theirs.layer_types]


@pytest.mark.parametrize("heads", [0, 5, 64])
def test_heads_that_do_not_divide_the_width(heads: int) -> None:
    with pytest.raises(ValueError, match="does not split"):
        modern(num_attention_heads=heads)
    with pytest.raises(ValueError, match="does not split"):
        NomicBertConfig.from_dict({"n_embd": 64, "n_head": heads})


# --- the heads -----------------------------------------------------------------------------------------------------


def test_soft_prompt_by_hand() -> None:
    """Linear -> ReLU -> Linear of ones, as eight rows."""
    stage = SecondStage(ModernBert(MODERN[0]), 8)
    randomize(stage, 5)
    state = {name.removeprefix("prompt_projection."): value for name, value in stage.state_dict().items()}
    hidden = (torch.ones(64) @ state["0.weight"].T + state["0.bias"]).clamp(min=0)
    expected = (hidden @ state["2.weight"].T + state["2.bias"]).reshape(8, 64)
    torch.testing.assert_close(stage.soft_prompt().detach(), expected)


# --- MiniLM --------------------------------------------------------------------------------------------------------


def test_minilm() -> None:
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    ours, theirs = MiniLM().eval(), as_any(BertModel)(config, add_pooling_layer=False).eval()
    randomize(ours)
    theirs.load_state_dict(ours.state_dict())
    ids, mask = batch(30522)
    with torch.inference_mode():
        expected = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        assert_same(ours(ids, mask), expected, mask)


def test_embedded_default_without_a_context_is_stock_minilm(builtin: LoadedModel) -> None:
    """Mean pooling and normalising over transformers' BERT on the official weights; whatever the input type."""
    stock: Any = as_any(BertModel).from_pretrained(builtin_folder(), add_pooling_layer=False).eval()
    texts = [
        "",
        "rye",
        "A beekeeper in the valley repaired the tidal tables.",
        "café naïve 東京 😀",
        "a " * 400,
    ]
    nothing = builtin.model.load_context(
        {**builtin.model.corpus_arrays([]), DATASET_EMBEDDINGS: np.zeros((0, 384), np.float32)}
    )
    for kind in InputType:
        ours = embed(builtin, tokenized(builtin, texts, kind), [nothing] * len(texts))
        for text, found in zip(tokenized(builtin, texts, kind), ours, strict=True):
            with torch.inference_mode():
                hidden = stock(input_ids=torch.tensor([text.input_ids])).last_hidden_state[0]
            expected = nn.functional.normalize(hidden.mean(dim=0), dim=0).numpy()
            np.testing.assert_allclose(found, expected, atol=1e-5)
    assert all(np.abs(a - b).max() > 0.01 for a, b in pairwise(ours))
