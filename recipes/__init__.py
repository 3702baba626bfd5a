"""Training, evaluation and publishing from the command line; in an installed package they are timm_jem.recipes."""
