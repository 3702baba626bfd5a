"""What the page of recipes/demo.py shows; only :mod:`timm_jem.demo.page` needs Gradio."""
