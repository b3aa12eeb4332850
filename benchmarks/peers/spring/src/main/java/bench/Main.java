package bench;

import java.time.Duration;
import java.util.Arrays;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.Scanner;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.atomic.AtomicInteger;
import org.apache.kafka.clients.consumer.ConsumerConfig;
import org.apache.kafka.clients.producer.ProducerConfig;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.serialization.StringDeserializer;
import org.apache.kafka.common.serialization.StringSerializer;
import org.springframework.context.annotation.AnnotationConfigApplicationContext;
import org.springframework.context.annotation.Bean;
import org.springframework.kafka.annotation.EnableKafka;
import org.springframework.kafka.annotation.KafkaListener;
import org.springframework.kafka.config.ConcurrentKafkaListenerContainerFactory;
import org.springframework.kafka.core.DefaultKafkaConsumerFactory;
import org.springframework.kafka.core.DefaultKafkaProducerFactory;
import org.springframework.kafka.core.KafkaTemplate;
import org.springframework.kafka.listener.ContainerProperties;
import org.springframework.kafka.listener.KafkaMessageListenerContainer;
import org.springframework.kafka.requestreply.ReplyingKafkaTemplate;
import org.springframework.messaging.handler.annotation.SendTo;
import tools.jackson.databind.JsonNode;
import tools.jackson.databind.ObjectMapper;

/**
 * A worker like worker.py: one job a line, one result a line. ReplyingKafkaTemplate and a
 * KafkaListener with SendTo, with their defaults (an idempotent producer, offsets committed for
 * each batch) but for the 5 ms that a producer lingers since Kafka 4, once for each hop. JSON is
 * parsed on both sides. No envelope, no deadline that the service sees.
 */
public final class Main {
    static final ObjectMapper JSON = new ObjectMapper();
    static final Duration TIMEOUT = Duration.ofSeconds(30);
    static String servers;
    static String name;
    static int size;
    static AnnotationConfigApplicationContext context;
    static ReplyingKafkaTemplate<String, String, String> template;
    static DefaultKafkaProducerFactory<String, String> producers;

    public record Text(String text) {}

    @EnableKafka
    public static class Service {
        @Bean
        ConcurrentKafkaListenerContainerFactory<String, String> kafkaListenerContainerFactory() {
            var factory = new ConcurrentKafkaListenerContainerFactory<String, String>();
            factory.setConsumerFactory(consumers(name, "earliest"));
            factory.setReplyTemplate(new KafkaTemplate<>(producers()));
            return factory;
        }

        @KafkaListener(topics = "#{T(bench.Main).topic()}", groupId = "#{T(bench.Main).topic()}")
        @SendTo
        public String echo(String value) {
            return JSON.writeValueAsString(JSON.readValue(value, Text.class));
        }
    }

    public static String topic() {
        return name;
    }

    static DefaultKafkaConsumerFactory<String, String> consumers(String group, String reset) {
        return new DefaultKafkaConsumerFactory<>(Map.of(
            ConsumerConfig.BOOTSTRAP_SERVERS_CONFIG, servers,
            ConsumerConfig.GROUP_ID_CONFIG, group,
            ConsumerConfig.AUTO_OFFSET_RESET_CONFIG, reset,
            ConsumerConfig.KEY_DESERIALIZER_CLASS_CONFIG, StringDeserializer.class,
            ConsumerConfig.VALUE_DESERIALIZER_CLASS_CONFIG, StringDeserializer.class));
    }

    static DefaultKafkaProducerFactory<String, String> producers() {
        producers = new DefaultKafkaProducerFactory<>(Map.of(
            ProducerConfig.BOOTSTRAP_SERVERS_CONFIG, servers,
            ProducerConfig.LINGER_MS_CONFIG, 0,
            ProducerConfig.KEY_SERIALIZER_CLASS_CONFIG, StringSerializer.class,
            ProducerConfig.VALUE_SERIALIZER_CLASS_CONFIG, StringSerializer.class));
        return producers;
    }

    static void ask() throws Exception {
        var properties = new ContainerProperties(name + ".replies");
        var container = new KafkaMessageListenerContainer<>(
            consumers(name + "-ask", "latest"), properties);
        template = new ReplyingKafkaTemplate<>(producers(), container);
        template.setDefaultReplyTimeout(TIMEOUT);
        template.start();
        if (!template.waitForAssignment(TIMEOUT)) {
            throw new IllegalStateException("no partition of the reply topic");
        }
        var sent = new ProducerRecord<String, String>(name, payload());
        var reply = template.sendAndReceive(sent).get().value();
        if (!JSON.readTree(reply).equals(JSON.readTree(payload()))) {
            throw new IllegalStateException(reply);
        }
    }

    static String payload() {
        return JSON.writeValueAsString(new Text("x".repeat(size - 11)));
    }

    /** Keeps requests in flight: each completed reply sends the next request, without a thread. */
    static Map<String, Object> closed(int level, double seconds) throws Exception {
        long begin = System.nanoTime() + (long) (seconds / 4 * 1e9);
        long end = begin + (long) (seconds * 1e9);
        var load = new Load(begin, end, level);
        for (int i = 0; i < level; i++) {
            load.next();
        }
        load.done.await();
        var took = Arrays.copyOf(load.took, Math.min(load.timed.get(), load.took.length));
        Arrays.sort(took);
        var result = new LinkedHashMap<String, Object>();
        result.put("count", load.count.get());
        result.put("rate", took.length / seconds);
        if (took.length > 0) {
            result.put("p50", percentile(took, 0.5));
            result.put("p99", percentile(took, 0.99));
            result.put("p999", percentile(took, 0.999));
        }
        return result;
    }

    static double percentile(long[] took, double place) {
        return took[Math.min(took.length - 1, (int) (place * took.length))] / 1e6;
    }

    static final class Load {
        final long begin;
        final long end;
        final CountDownLatch done;
        final AtomicInteger count = new AtomicInteger();
        final AtomicInteger timed = new AtomicInteger();
        final long[] took = new long[2_000_000];

        Load(long begin, long end, int level) {
            this.begin = begin;
            this.end = end;
            this.done = new CountDownLatch(level);
        }

        void next() {
            long sent = System.nanoTime();
            if (sent >= end) {
                done.countDown();
                return;
            }
            template.sendAndReceive(new ProducerRecord<String, String>(name, payload()))
                .whenComplete((reply, error) -> {
                    if (error != null) {
                        error.printStackTrace();
                        System.exit(1);
                    }
                    JSON.readValue(reply.value(), Text.class);
                    count.incrementAndGet();
                    long now = System.nanoTime();
                    int place;
                    if (begin <= now && now <= end
                        && (place = timed.getAndIncrement()) < took.length) {
                        took[place] = now - sent;
                    }
                    next();
                });
        }
    }

    static void leave() throws Exception {
        if (context != null) {
            context.close();
            context = null;
        }
        if (template != null) {
            template.destroy();
            template = null;
        }
        producers.destroy();
    }

    static Object handle(JsonNode job) throws Exception {
        servers = job.get("servers").asString();
        name = job.get("name").asString();
        size = job.get("size").asInt();
        switch (job.get("role").asString()) {
            case "answer" -> context = new AnnotationConfigApplicationContext(Service.class);
            case "ask" -> ask();
            case "closed" -> {
                return closed(job.get("level").asInt(), job.get("seconds").asDouble());
            }
            case "leave" -> leave();
            default -> throw new IllegalArgumentException(job.toString());
        }
        return Map.of();
    }

    public static void main(String[] arguments) throws Exception {
        var input = new Scanner(System.in);
        while (input.hasNextLine()) {
            System.out.println(JSON.writeValueAsString(handle(JSON.readTree(input.nextLine()))));
        }
        System.exit(0);
    }

    private Main() {}
}
