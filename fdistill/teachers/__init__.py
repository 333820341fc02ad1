"""A pretrained checkpoint as a teacher: its network, its autoencoder, its text encoders."""
