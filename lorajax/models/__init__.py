"""Models: one decoder, one small file per family, and what reads and writes checkpoints."""

from lorajax.models import llama

# model_type of config.json -> the module that knows the family.
FAMILIES = {"llama": llama}
