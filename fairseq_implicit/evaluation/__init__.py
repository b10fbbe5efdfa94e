"""What a checkpoint does on data, as rows of numbers: nothing here prints, draws or reads arguments."""
