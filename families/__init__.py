"""What a pretrained checkpoint is: its parts, its conditions, its adapters, its pipeline."""
