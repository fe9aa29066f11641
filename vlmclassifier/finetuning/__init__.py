"""Fine-tuning vision-language models: rows, batches, trained parts, the loss, the trainer, trained weights."""
