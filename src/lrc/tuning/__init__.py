"""Chat tuning: supervised fine-tuning of a student on conversations, with TRL."""
