# quantkit in a container. Not built by CI: there is no Docker where it runs.
#
#   CPU   docker build -t quantkit .
#   CUDA  docker build -t quantkit:cuda --build-arg TORCH=cu128 .     (the host: a driver and nvidia-container-toolkit)
#
#   docker run --rm -v "$PWD:/files" quantkit make --recipe 1.58bit
#   docker run --rm --gpus all -v "$PWD:/files" -v /models:/models:ro quantkit:cuda make /models/DeepSeek-R1 -o /files/r1
#   docker run --rm -p 127.0.0.1:8000:8000 -e QUANTKIT_API_KEY -v "$PWD:/files" quantkit serve FILE --host 0.0.0.0
FROM python:3.11-slim

# Both compile on first use: experts in C for the processor, Triton's launchers for the GPU.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

# torch's wheels bring CUDA along, so the base image needs none.
ARG TORCH=cpu
COPY . /src
RUN pip install --no-cache-dir -c /src/.ci/constraints.txt --index-url "https://download.pytorch.org/whl/${TORCH}" torch \
    && pip install --no-cache-dir -c /src/.ci/constraints.txt "/src[serve,grammar,plots,data]" \
    && rm -rf /src

WORKDIR /files
ENV HOME=/files
EXPOSE 8000
ENTRYPOINT ["quantkit"]
CMD ["--help"]
