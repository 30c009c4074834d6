"""What an attacker gets out of an unlearned model: attacks, each with its budget, and a verdict on each."""
