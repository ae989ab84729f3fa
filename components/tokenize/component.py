from kfp import dsl

from nudge.components.common.core.images import TRAIN_IMAGE


# A base model may be a GGUF file, whose tokenizer comes through PyTorch.
@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def tokenize(
    recipe: str, base_model: str, corpus: dsl.Input[dsl.Dataset], tokens: dsl.Output[dsl.Dataset]
) -> None:
    """Turn a corpus into token shards, with the base model's tokenizer or one trained on it.

    Args:
        recipe: The recipe, as YAML text or a URI.
        base_model: The model whose tokenizer is taken; empty means as the recipe says.
        corpus: What `ingest` made.
        tokens: Token shards with document offsets, and the tokenizer.
    """
    from pathlib import Path

    from nudge.components.common.core.step import exit_with_user_errors
    from nudge.components.tokenize.settings import tokenize_settings
    from nudge.components.tokenize.tokenize import tokenize

    with exit_with_user_errors():
        settings = tokenize_settings(recipe, base_model=base_model)
        tokens.metadata.update(
            tokenize(settings, corpus=Path(corpus.path), tokens=Path(tokens.path))
        )
