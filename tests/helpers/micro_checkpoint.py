"""A model of four layers with a vocabulary of seven words, and random weights that no test has to wait for."""

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.checkpoints import folder
from hybridvlm.config import Buckets, ModelConfig, VisionConfig
from hybridvlm.inference.model import Model
from hybridvlm.models.prompt import PromptStyle
from hybridvlm.tokenizers.word_level import WordLevel

WORDS = ("red", "green", "blue", "what", "where", "?")


def micro_model(**changes) -> Model:
    tokenizer = WordLevel.from_words(WORDS, special=("<pad>", "<eos>"))
    vision = VisionConfig(
        kind="stem", image_size=(16, 16), patch_size=8, width=12, downsample=1, max_frames=4, stem_channels=(4,)
    )
    config = ModelConfig(
        pattern="M*-M",
        width=32,
        vocab_size=tokenizer.size,
        mamba_heads=2,
        mamba_head_dim=8,
        ssm_groups=1,
        ssm_state=8,
        attention_heads=2,
        kv_heads=1,
        head_dim=8,
        mlp_width=48,
        eos_ids=(1,),
        vision=vision,
        name="micro",
    )
    # drawn here, since running the modules' own init op by op takes far longer than any test
    rng = np.random.default_rng(1)
    flat = {name: rng.normal(0, 2, shape).astype(np.float32) for name, shape in folder.expected_shapes(config).items()}
    params = jax.tree.map(jnp.asarray, folder.unflatten(flat))
    settings = {
        "buckets": Buckets(frames=(4,), text=(8,), max_new=1),
        "style": PromptStyle(question="what {question} ?"),
    }
    return Model(config, params, tokenizer, **(settings | changes))
