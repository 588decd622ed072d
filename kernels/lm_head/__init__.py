"""The LM head: final RMSNorm and logits, from bfloat16 or int8 rows."""
