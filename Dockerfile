# The base install: embeds images, fits ensembles, predicts and submits, on CPUs and without PyTorch.
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
WORKDIR /toolkit
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY isic isic
COPY infer infer
COPY train train
COPY export export
COPY benchmarks benchmarks
COPY configs configs
RUN pip install --no-cache-dir .
USER nobody
ENTRYPOINT ["isic-toolkit"]
CMD ["infer", "--help"]
