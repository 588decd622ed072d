"""The LM head: final RMSNorm and logits, from bfloat16, float16, float32 or int8 rows."""
