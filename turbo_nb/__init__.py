"""turbo_nb: TurboDiffusion video models in Jupyter, from wheels alone."""
