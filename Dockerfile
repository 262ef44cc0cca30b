FROM python:3.13-slim-trixie

ENV HOST=0.0.0.0 \
    PYTHONUNBUFFERED=1

WORKDIR /srv/wallet

COPY requirements.txt .
RUN pip install --no-cache-dir --root-user-action=ignore -r requirements.txt \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin wallet

COPY dbmate.env .
COPY db db
COPY app app

USER 10001:10001

EXPOSE 8000

# Without a proxy: one that is configured for containers knows nothing about this container's 127.0.0.1.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --start-interval=1s \
    CMD ["python", "-c", "from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open('http://127.0.0.1:8000/healthz', timeout=4)"]

CMD ["python", "-m", "app"]
