//! What the clients say when the other end is absent, deaf or something else. The calls
//! themselves are tested against the real service in `client/tests/control.rs`.

use super::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

fn hasty() -> Patience {
    let ms = Duration::from_millis;
    Patience { connect: ms(300), call: ms(400), retry: ms(200) }
}

fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
}

#[test]
fn an_address_that_is_none_is_refused_before_any_connection() {
    run(async {
        for bad in ["", "localhost", "127.0.0.1:0", ":7400", "127.0.0.1:99999", "a b:1", "http://"] {
            let problem = MdsClient::new(bad, hasty()).expect_err(bad);
            assert_eq!(problem.kind, ProblemKind::Invalid, "{bad}");
        }
        for good in ["127.0.0.1:7400", "http://storage1:7400/", "[::1]:7400"] {
            MdsClient::new(good, hasty()).expect(good);
        }
    });
}

#[test]
fn an_absent_mds_is_named_with_its_address_and_the_fix_within_patience() {
    run(async {
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
        let before = Instant::now();
        let problem = MdsClient::new(&free, hasty()).unwrap().status().await.unwrap_err();
        assert_eq!(problem.kind, ProblemKind::Unreachable, "{problem}");
        let text = problem.to_string();
        for part in [free.as_str(), "refused", "--mds"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(before.elapsed() >= Duration::from_millis(100), "it tried more than once");
        assert!(before.elapsed() < Duration::from_secs(2));
    });
}

#[test]
fn a_deaf_mds_ends_in_a_time_out() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let _deaf = tokio::spawn(async move {
            let (_socket, _) = listener.accept().await.unwrap();
            std::future::pending::<()>().await;
        });
        let problem = MdsClient::new(&address, hasty()).unwrap().status().await.unwrap_err();
        assert_eq!(problem.kind, ProblemKind::TimedOut, "{problem}");
    });
}

#[test]
fn something_else_on_the_port_is_a_problem_and_no_panic() {
    run(async {
        for reply in [&b"SSH-2.0-OpenSSH_9.2\r\n"[..], b"HTTP/1.1 400 Bad Request\r\n\r\n", &[0xff; 64]] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap().to_string();
            let other = tokio::spawn(async move {
                while let Ok((mut socket, _)) = listener.accept().await {
                    let _ = socket.write_all(reply).await;
                    let _ = socket.read(&mut [0; 256]).await;
                }
            });
            let problem = AdminClient::new(&address, hasty()).unwrap().status().await.unwrap_err();
            assert!(problem.to_string().contains(&address), "{problem}");
            other.abort();
        }
    });
}
