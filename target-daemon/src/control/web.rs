//! `/metrics` and `/healthz` over HTTP.

use super::{Control, lock};
use crate::metrics::render;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use std::net::TcpListener;
use std::sync::Arc;

/// Serves until the listener fails.
pub(super) async fn serve(
    control: Arc<Control>,
    listener: TcpListener,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let router = Router::new().route("/metrics", get(metrics)).route("/healthz", get(health));
    axum::serve(tokio::net::TcpListener::from_std(listener)?, router.with_state(control)).await?;
    Ok(())
}

async fn metrics(State(control): State<Arc<Control>>) -> impl IntoResponse {
    let counters: Vec<_> = control.ports.iter().map(|port| port.counters().clone()).collect();
    let page = render(&control.process, &counters);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page)
}

/// 200 while every shard works and there is a map; else 503 and why.
async fn health(State(control): State<Arc<Control>>) -> (StatusCode, String) {
    let state = lock(&control.state);
    if let Some((shard, why)) = state.agent.failed().first_key_value() {
        return (StatusCode::SERVICE_UNAVAILABLE, format!("shard {shard} failed: {why}\n"));
    }
    if state.agent.map().is_none() {
        return (StatusCode::SERVICE_UNAVAILABLE, "no cluster map yet: no MDS answered\n".into());
    }
    (StatusCode::OK, "ok\n".into())
}
