# turbo_nb on RunPod's PyTorch image; docs/runpod.md describes how to build and push it.
# The start script finds the packages of this image, so JupyterLab is up within seconds and the volume stays empty.
ARG BASE=runpod/pytorch:1.0.2-cu1281-torch280-ubuntu2404
FROM ${BASE}

COPY pyproject.toml README.md LICENSE runpod_start.sh /opt/turbo_nb/
COPY turbo_nb /opt/turbo_nb/turbo_nb
COPY notebooks /opt/turbo_nb/notebooks

# pip may not replace the image's torch, because it was built for the image's CUDA.
RUN python -c 'import torch; print(f"torch=={torch.__version__}")' >/opt/turbo_nb/constraints.txt && \
    python -m pip install --no-cache-dir --constraint /opt/turbo_nb/constraints.txt --editable '/opt/turbo_nb[notebook,ray]' && \
    turbo-nb --help >/dev/null

CMD ["/opt/turbo_nb/runpod_start.sh"]
