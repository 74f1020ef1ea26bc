"""How the small model in the box is made: data, VAE, joint transformer and text training, export. Not published."""
