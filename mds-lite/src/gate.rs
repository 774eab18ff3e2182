//! Who may call: the one place through which every call comes before it is looked at.
//!
//! A [`Gate`] is given who calls and what, and refuses or not. Today everybody is let in ([`Anyone`]); TLS and
//! tokens will be a gate of their own, set in [`crate::Config::gate`]: what a certificate says will be a field
//! of [`Caller`] beside the bearer token, which is handed on as it came.

use protocol::control::Problem;
use std::fmt::Debug;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tonic::Status;
use tonic::codegen::{Service, http};
use tonic::transport::server::TcpConnectInfo;

/// Who calls, as far as is known before anything is believed.
#[derive(Clone, Copy, Debug)]
pub struct Caller<'a> {
    /// The other end of the connection.
    pub peer: Option<SocketAddr>,
    /// What came as `authorization`, such as `Bearer ...`; not checked by anybody yet.
    pub authorization: Option<&'a str>,
    /// What is called, such as `/ashlar.v1.Mds/CreateVolume`.
    pub call: &'a str,
}

/// Decides who may call what.
pub trait Gate: Debug + Send + Sync {
    /// Lets a call in.
    ///
    /// # Errors
    /// `Refused`, which the caller is told in full.
    fn admit(&self, caller: &Caller<'_>) -> Result<(), Problem>;
}

/// Lets everybody in.
#[derive(Clone, Copy, Debug, Default)]
pub struct Anyone;

impl Gate for Anyone {
    fn admit(&self, _: &Caller<'_>) -> Result<(), Problem> {
        Ok(())
    }
}

/// Puts a gate before services.
#[derive(Clone, Debug)]
pub(crate) struct GateLayer(pub(crate) Arc<dyn Gate>);

impl<S> tower_layer::Layer<S> for GateLayer {
    type Service = Gated<S>;

    fn layer(&self, inner: S) -> Gated<S> {
        Gated { inner, gate: self.0.clone() }
    }
}

/// Services behind a gate.
#[derive(Clone, Debug)]
pub(crate) struct Gated<S> {
    inner: S,
    gate: Arc<dyn Gate>,
}

impl<S, B, R> Service<http::Request<B>> for Gated<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>>,
    S::Future: Send + 'static,
    S::Error: 'static,
    R: Default + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let header = request.headers().get(http::header::AUTHORIZATION);
        let caller = Caller {
            peer: request.extensions().get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr),
            authorization: header.and_then(|value| value.to_str().ok()),
            call: request.uri().path(),
        };
        match self.gate.admit(&caller) {
            Ok(()) => Box::pin(self.inner.call(request)),
            Err(problem) => {
                tracing::warn!(peer = ?caller.peer, call = caller.call, %problem, "refused");
                Box::pin(async move { Ok(Status::from(problem).into_http()) })
            }
        }
    }
}
